"""Clips from folders of frames: which frames, the same crop and colours for all of them, whoever makes the batch."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.make_motion_clips import MOTIONS, make
from selfsup.config import Crops, DataConfig, ViewsConfig, load
from selfsup.data import photometric
from selfsup.data.clip_frames import centred, drawn, window
from selfsup.data.decode import BadImage
from selfsup.data.eval_transform import eval_batches, eval_crop
from selfsup.data.loader import Loader
from selfsup.data.sources import open_source
from selfsup.data.views import ViewParams, crop, multicrop, resolutions
from selfsup.errors import UserError

CONFIG = DataConfig(frames=3, stride=2)
VIEWS = multicrop(
    ViewsConfig(**{"global": Crops(size=16, blur=(1.0, 0.1)), "local": Crops(count=2, size=8, frames=2, stride=1)})
)
MEAN = STD = (0.5, 0.5, 0.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """8 motions x 3 clips of 7 frames over real photographs."""
    return make(tmp_path_factory.mktemp("clips"), clips=3, frames=7, size=24) / "train"


@pytest.fixture(scope="module")
def source(folder):
    return open_source(str(folder), channels=3, config=CONFIG)


def batches(source, start=0, end=3, **options):
    return list(Loader(source, VIEWS, **{"seed": 1, "global_batch": 8, **options}).stream(start, end))


def same(a, b) -> bool:
    pairs = zip([*a.crops, *a.params, a.ids, a.labels], [*b.crops, *b.params, b.ids, b.labels], strict=True)
    return all(torch.equal(x, y) for x, y in pairs) and a.bad == b.bad


def test_a_clip_fits_its_video() -> None:
    """A wide stride gives way; of too few frames the last is repeated; the middle clip is in the middle."""
    assert window(20, 4, 3) == (3, 11)
    assert window(7, 4, 3) == (2, 1) and centred(7, 4, 3) == [0, 2, 4, 6]
    assert centred(2, 4, 3) == [0, 1, 1, 1] and centred(1, 1, 5) == [0]
    assert centred(20, 4, 3) == [5, 8, 11, 14]
    assert [centred(20, 4, 3, k, 2)[0] for k in range(2)] == [2, 7]


def test_first_frames_are_uniform_and_differ_by_view_and_epoch() -> None:
    starts = [drawn(VIEWS[0], CONFIG, 0, 0, i, 9)[0] for i in range(2000)]
    assert np.bincount(starts).tolist() == pytest.approx([400] * 5, abs=80)  # 9 frames, 3 of stride 2: 5 places
    others = [drawn(VIEWS[1], CONFIG, 0, 0, i, 9)[0] for i in range(2000)]
    later = [drawn(VIEWS[0], CONFIG, 0, 1, i, 9)[0] for i in range(2000)]
    for x in (others, later):
        assert abs(np.corrcoef(starts, x)[0, 1]) < 0.1
    assert len(drawn(VIEWS[2], CONFIG, 0, 0, 0, 9)) == 2


def test_crops_are_those_of_the_frames(source) -> None:
    """Each frame of a view is what `crop` gives of that frame of that video, with the parameters of the view."""
    ((batch,),) = batches(source, end=1)
    assert [list(c.shape) for c in batch.crops] == [[2, 8, 9, 16, 16], [2, 8, 6, 8, 8]]  # [V, B, T*C, S, S]
    for views, crops, params in zip(resolutions(VIEWS), batch.crops, batch.params, strict=True):
        for v, view in enumerate(views):
            for b, i in enumerate(batch.ids.tolist()):
                chosen = drawn(view, CONFIG, 1, 0, i, 7)
                names = sorted((p for p in open_path(source, i).iterdir()), key=lambda p: int(p.stem))
                found = [crop(Image.open(names[n]), ViewParams.unpack(params[v, b]), view.size) for n in chosen]
                assert np.array_equal(crops[v, b].numpy(), np.concatenate(found))
    assert batch.labels.tolist() == [source.labels[i] for i in batch.ids.tolist()]
    assert source.classes == sorted(MOTIONS)


def open_path(source, i) -> Path:
    return Path(source.name(i))


def test_batches_do_not_depend_on_who_makes_them(source) -> None:
    whole = batches(source)
    assert all(same(a[0], b[0]) for a, b in zip(whole, batches(source, workers=2), strict=True))
    assert same(whole[2][0], batches(source, start=2)[0][0])
    parts = batches(source, accumulate=2, end=1)[0]
    assert torch.equal(torch.cat([p.crops[0] for p in parts], dim=1), whole[0][0].crops[0])
    assert not same(whole[0][0], batches(source, seed=2, end=1)[0][0])


def test_colours_are_one_for_a_clip_and_blur_stays_in_its_frame(source) -> None:
    ((batch,),) = batches(source, end=1)
    crops, params = batch.crops[0], batch.params[0]
    made = photometric.apply(crops, params, MEAN, STD, "cpu", frames=3)
    for t in range(3):
        alone = photometric.apply(crops[:, :, 3 * t : 3 * t + 3], params, MEAN, STD, "cpu")
        assert torch.equal(made[:, :, 3 * t : 3 * t + 3], alone)
    assert (params[0, :, 12] > 0).all()  # blurred, every one


def test_evaluation_takes_the_middle_or_several(folder, source) -> None:
    x, labels, _ = next(eval_batches(source, size=16, mean=MEAN, std=STD, batch_size=5))
    assert x.shape == (5, 9, 16, 16) and labels.tolist() == [0, 0, 0, 1, 1]
    frame = Image.open(sorted(open_path(source, 0).iterdir())[centred(7, 3, 2)[1]])
    expected = torch.tensor(eval_crop(frame, 16, None)).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(x[0, 3:6], expected)
    two = open_source(str(folder), channels=3, config=CONFIG.model_copy(update={"clips": 2}))
    assert two.read(0).shape == (24, 24, 18)


def test_policies_are_one_for_a_clip(folder) -> None:
    """A still video stays still, whatever is done to it."""
    views = multicrop(ViewsConfig(**{"global": Crops(size=16, policy="randaugment"), "local": Crops(count=0)}))
    still = open_source(str(folder), channels=3, config=CONFIG)
    still.video = lambda i, opened=still.video: _Still(opened(i))
    ((batch,),) = Loader(still, views, seed=0, global_batch=8).stream(0, 1)
    first, last = batch.crops[0][:, :, :3], batch.crops[0][:, :, 6:]
    assert torch.equal(first, last)


class _Still:
    def __init__(self, video) -> None:
        self.video, self.count = video, video.count

    def frames(self, wanted):
        return [self.video.frames([0])[0] for _ in wanted]


def test_frames_by_their_numbers_and_what_is_broken(tmp_path, folder) -> None:
    good = [Image.open(p) for p in sorted((folder / "pan_up" / "0000").iterdir())]
    for name, size in (("a", 24), ("b", 24), ("c", 24), ("d", 12)):
        (tmp_path / name).mkdir()
        for n, picture in enumerate([*good, *good]):
            picture.resize((size if n == 9 else 24, 24)).save(tmp_path / name / f"f{n}.png")
    cut = tmp_path / "b" / "f9.png"
    cut.write_bytes(cut.read_bytes()[:200])
    config = DataConfig(frames=14)
    source = open_source(str(tmp_path), channels=3, config=config)
    assert source.labels is None and len(source) == 4
    assert np.array_equal(source.read(0)[:, :, 30:33], np.asarray(good[10 - 7]))  # f10 after f9
    with pytest.raises(BadImage, match=r"frame f9\.png: .*truncated|frame f9\.png"):
        source.read(1)
    with pytest.raises(BadImage, match=r"frame f9\.png is 12x24, others are 24x24"):
        source.read(3)
    ((batch,),) = Loader(source, [VIEWS[0]], seed=0, global_batch=4).stream(0, 1)
    shown = dict(batch.bad)  # only where the clip holds the frame
    views = [drawn(VIEWS[0], config, 0, 0, i, 14) for i in (1, 3)]
    assert all(9 in v for v in views) == (len(shown) == 2)
    assert all("f9.png" in reason for reason in shown.values())


def test_lists(tmp_path, folder) -> None:
    lines = [f"{folder}/pan_up/0000 1", f"{folder}/pan_up/0001\t0", f"{folder}/zoom_in/0000 1", ""]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    source = open_source(str(tmp_path / "list.txt"), channels=1, config=CONFIG)
    assert source.labels.tolist() == [1, 0, 1] and source.read(2).shape == (24, 24, 3)


def test_what_is_no_set_of_clips(tmp_path, folder) -> None:
    with pytest.raises(UserError, match="holds pictures itself"):
        open_source(str(folder / "pan_up" / "0000"), channels=3, config=CONFIG)
    (tmp_path / "linked").symlink_to(folder)
    (tmp_path / "linked_again").symlink_to(folder)
    assert len(open_source(str(tmp_path), channels=3, config=CONFIG)) == 24  # each folder once
    (tmp_path / "linked").unlink()
    (tmp_path / "linked_again").unlink()
    with pytest.raises(UserError, match="no videos in"):
        open_source(str(tmp_path), channels=3, config=CONFIG)
    with pytest.raises(UserError, match="asks for clips"):
        open_source("demo", channels=3, config=CONFIG)
    with pytest.raises(UserError, match=r"views\.global\.frames"):
        load(None, ["views.global.frames=4"])
