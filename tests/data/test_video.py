"""Video files through PyAV: the frames that were encoded, in any order of asking, and what is no video."""

import sys

import av
import numpy as np
import pytest

from benchmarks.make_motion_clips import clip, make, photographs
from selfsup.config import Crops, DataConfig, ViewsConfig
from selfsup.data.decode import BadImage
from selfsup.data.loader import Loader
from selfsup.data.sources import open_source
from selfsup.data.video import VideoFile
from selfsup.data.views import multicrop
from selfsup.errors import UserError

FRAMES = 30


@pytest.fixture(scope="module")
def pictures():
    return clip(photographs()[0], "pan_right", FRAMES, 32, np.random.default_rng(0))


def encode(path, pictures, codec, pixels, **options) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options={k: str(v) for k, v in options.items()})
        stream.width, stream.height, stream.pix_fmt = 32, 32, pixels
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())


def read_all(path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


@pytest.mark.parametrize("wanted", [[0], [29], [3, 4, 21], [11, 12, 13], list(range(FRAMES))], ids=str)
@pytest.mark.parametrize("name", ["b.mp4", "l.mkv"])
def test_frames_are_those_of_a_whole_decoding(tmp_path_factory, pictures, name, wanted) -> None:
    """With key frames every ten and frames stored out of order; and lossless, where they are the pictures themselves."""
    path = tmp_path_factory.getbasetemp() / name
    if not path.exists():
        if name == "b.mp4":
            encode(path, pictures, "mpeg4", "yuv420p", g=10, bf=2)
        else:
            encode(path, pictures, "ffv1", "bgr0")
    video = VideoFile(bytes(path), 3, 10**6)
    assert video.count == FRAMES
    found = [np.asarray(x) for x in video.frames(wanted)]
    whole = read_all(path)
    assert all(np.array_equal(f, whole[i]) for f, i in zip(found, wanted, strict=True))
    if name == "l.mkv":
        assert all(np.array_equal(f, np.asarray(pictures[i])) for f, i in zip(found, wanted, strict=True))
        assert np.asarray(VideoFile(bytes(path), 1, 10**6).frames([2])[0]).shape == (32, 32)


def test_only_what_is_needed_is_decoded(tmp_path, pictures, monkeypatch) -> None:
    path = tmp_path / "v.mp4"
    encode(path, pictures, "mpeg4", "yuv420p", g=5)
    converted = []
    whole = av.container.InputContainer.decode

    class Counted:
        def __init__(self, container) -> None:
            self.container = container

        def __getattr__(self, name):
            return getattr(self.container, name)

        def decode(self, stream):
            for frame in whole(self.container, stream):
                converted.append(frame.pts)
                yield frame

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.container.close()

    video = VideoFile(bytes(path), 3, 10**6)
    opened = av.open
    monkeypatch.setattr(av, "open", lambda *a: Counted(opened(*a)))
    video.frames([21, 22])
    assert len(converted) == 3  # from the key frame 20


def test_broken_files_are_replaced_and_listed(tmp_path) -> None:
    root = make(tmp_path, clips=2, frames=6, size=24, kind="mp4") / "train"
    (root / "pan_up" / "0000.mp4").write_bytes(b"<html>not found</html>")
    whole = (root / "pan_up" / "0001.mp4").read_bytes()
    (root / "pan_up" / "0001.mp4").write_bytes(whole[: len(whole) // 2])
    (root / "zoom_in" / "0000.mp4").write_bytes(b"")
    source = open_source(str(root), channels=3, config=DataConfig(frames=4))
    assert len(source) == 16 and len(source.classes) == 8
    views = multicrop(ViewsConfig(**{"global": Crops(count=1, size=16), "local": Crops(count=0)}))
    ((batch,),) = Loader(source, views, seed=0, global_batch=16).stream(0, 1)
    assert {name.split("train/")[1] for name, _ in batch.bad} == {
        "pan_up/0000.mp4",
        "pan_up/0001.mp4",
        "zoom_in/0000.mp4",
    }
    assert batch.crops[0].shape == (1, 16, 12, 16, 16)
    with pytest.raises(BadImage):
        source.read(int(np.flatnonzero(source.labels == source.classes.index("pan_up"))[0]))


def test_without_pyav_and_other_channels(tmp_path, monkeypatch) -> None:
    (tmp_path / "a.mp4").write_bytes(b"x")
    with pytest.raises(UserError, match="1 or 3 channels"):
        VideoFile(bytes(tmp_path / "a.mp4"), 4, 10**6)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r"selfsup\[video\]"):
        VideoFile(bytes(tmp_path / "a.mp4"), 3, 10**6)
