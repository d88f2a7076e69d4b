"""Volumes: how files are read, what crops are cut, and what is refused."""

import gzip
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

from selfsup import config
from selfsup.config import DataConfig
from selfsup.data.decode import BadImage
from selfsup.data.loader import Loader
from selfsup.data.views import multicrop
from selfsup.data.volume_batch import boxes, cut
from selfsup.data.volumes import levels, open_volumes, read_header, read_volume, resized, scaled
from selfsup.errors import UserError
from tests import volumes


def save(path: Path, array: np.ndarray, affine=None) -> str:
    nibabel.save(nibabel.Nifti1Image(array, np.diag([2.0, 1.0, 3.0, 1.0]) if affine is None else affine), path)
    return str(path)


@pytest.fixture(scope="module")
def real() -> np.ndarray:
    """A scan, [X, Y, Z]."""
    return np.asanyarray(nibabel.load(volumes.ANATOMICAL).dataobj).astype(np.int16)


def test_axes_are_turned_by_the_header(tmp_path: Path, real: np.ndarray):
    found, spacing = read_volume(save(tmp_path / "a.nii.gz", real), 1, DataConfig())
    assert found.shape == (1, 25, 41, 33) and spacing == (3.0, 1.0, 2.0)
    assert found[0, 0, 0, 0] == real[0, -1, -1] and found[0, -1, -1, -1] == real[-1, 0, 0]  # top, front, left first
    turned = np.diag([-2.0, 1.0, 3.0, 1.0])  # columns stored from right to left
    other, _ = read_volume(save(tmp_path / "b.nii", real[::-1], turned), 1, DataConfig())
    assert np.array_equal(found, other)
    np.save(tmp_path / "c.npy", found[0])
    assert np.array_equal(read_volume(str(tmp_path / "c.npy"), 1, DataConfig())[0], found)


def test_channels(tmp_path: Path):
    path, times = str(volumes.FOUR_D), np.asanyarray(nibabel.load(volumes.FOUR_D).dataobj)
    both = read_volume(path, 2, DataConfig())[0]
    assert both.shape == (2, 12, 20, 32)
    assert np.array_equal(read_volume(path, 1, DataConfig(channel=1))[0][0], both[1]) and not np.array_equal(*both)
    assert np.allclose(np.sort(both[1].ravel()), np.sort(times[..., 1].ravel()))
    with pytest.raises(
        BadImage, match=r"2 channels of shape \[12, 20, 32\].*data.channel=0..1 and backbone.in_chans=1"
    ):
        read_header(path, 1, DataConfig())
    with pytest.raises(BadImage, match=r"data.channel=2: it has 2 channels, 0 to 1"):
        read_header(path, 1, DataConfig(channel=2))
    with pytest.raises(BadImage, match="no channels to choose from"):
        read_header(str(volumes.ANATOMICAL), 1, DataConfig(channel=0))


def test_levels_by_window_and_percentiles(real: np.ndarray):
    volume = real.T[None].astype(np.float32)
    low, high = np.percentile(volume, (1, 99))
    found = levels(volume, DataConfig(percentiles=(1, 99)))
    assert found.dtype == np.uint8 and (found[volume <= low] == 0).all() and (found[volume >= high] == 255).all()
    middle = np.float32(low + high) / 2
    window = scaled(np.array([[[[-100.0, middle, np.nan, 1e9]]]]), DataConfig(value_range=(float(low), float(high))))
    assert np.allclose(window, [0, 0.5, 0, 1])
    assert (levels(np.full((1, 2, 2, 2), np.nan), DataConfig()) == 0).all()


def test_spacing_is_resampled(tmp_path: Path, real: np.ndarray):
    path = save(tmp_path / "a.nii", real)
    found, spacing = read_volume(path, 1, DataConfig(spacing=(1.5, 2, 2)))
    assert found.shape == (1, 50, 20, 33) and spacing == (1.5, 2, 2)
    ramp = torch.arange(12.0).view(1, 12, 1, 1).expand(1, 12, 4, 4).contiguous()
    assert torch.allclose(resized(ramp, (6, 4, 4))[0, 1:-1, 0, 0], torch.arange(0.5, 12, 2)[1:-1])
    np.save(tmp_path / "a.npy", real)
    with pytest.raises(BadImage, match=r"data.spacing=\[1.0, 1.0, 1.0\]: a .npy file has no spacing"):
        read_header(str(tmp_path / "a.npy"), 1, DataConfig(spacing=(1, 1, 1)))


def test_broken_files(tmp_path: Path, real: np.ndarray):
    np.save(tmp_path / "pickle.npy", np.array([{}]), allow_pickle=True)
    np.save(tmp_path / "flat.npy", np.zeros((4, 4)))
    np.save(tmp_path / "complex.npy", np.zeros((4, 4, 4), complex))
    (tmp_path / "text.nii").write_text("no volume")
    whole = Path(save(tmp_path / "cut.nii.gz", real)).read_bytes()
    (tmp_path / "cut.nii.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.nii.gz").write_bytes(gzip.compress(b""))
    said = {
        "pickle.npy": "broken, or a pickle", "flat.npy": r"\[4, 4\] has 2 axes", "complex.npy": "values of type complex128",
        "text.nii": "broken", "cut.nii.gz": "broken", "empty.nii.gz": "broken",
    }  # fmt: skip
    for name, why in said.items():
        with pytest.raises(BadImage, match=why):
            read_volume(str(tmp_path / name), 1, DataConfig())
    with pytest.raises(BadImage, match=r"33,825 voxels, more than data.max_pixels=1000"):
        read_header(str(volumes.ANATOMICAL), 1, DataConfig(max_pixels=1000))
    with pytest.raises(UserError, match=r"flat.npy: shape \[4, 4\] has 2 axes; a volume has three"):
        open_volumes(str(tmp_path / "flat.npy"), channels=1, config=DataConfig())
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match=r"no volumes in it or below; looked for .nii .nii.gz .npy"):
        open_volumes(str(tmp_path / "none"), channels=1, config=DataConfig())
    with pytest.raises(UserError, match=r"data=demo: no such folder or file; for volumes give"):
        open_volumes("demo", channels=1, config=DataConfig())


WORDS = [
    "backbone=vit3d_tiny",
    "backbone.in_chans=1",
    "views.global.size=8",
    "views.local.count=1",
    "views.local.size=6",
]


def settings(*words: str):
    return config.load("dino_vit3d", [*WORDS, *words])


def test_boxes_are_a_pure_function_and_inside():
    for words in (("views.global.slices=4",), ("views.global.extent=[0.5,2]", "views.global.dflip=0.5")):
        view = multicrop(settings(*words).views)[1]
        epochs, ids = np.arange(200) // 50, np.arange(200)
        extents = np.tile([[30, 40, 50]], (200, 1))
        starts, sides, flips = boxes(view, 3, epochs, ids, extents)
        assert (starts >= 0).all() and (starts + sides <= extents).all() and 0.3 < flips.mean() < 0.7
        one = boxes(view, 3, epochs[7:8], ids[7:8], extents[7:8])
        assert all(np.array_equal(a[7:8], b) for a, b in zip((starts, sides, flips), one))
        assert len({tuple(row) for row in np.hstack([starts, sides]).tolist()}) > 190
        if "extent" in words[0]:
            assert sides.min() >= 4 and sides.max() <= 16 and (sides == sides[:, :1]).all()
        else:
            share = sides.prod(1) / 60000
            assert share.min() > 0.25 and share.max() <= 1 and (sides / extents).max(1).mean() / share.mean() > 1.05


def test_cut_pads_and_resamples(real: np.ndarray):
    volume = levels(real.T[None].astype(np.float32), DataConfig())
    exact = cut(volume, np.array([2, 3, 4]), np.array([8, 8, 8]), (8, 8, 8))
    assert np.array_equal(exact, volume[:, 2:10, 3:11, 4:12])
    padded = cut(volume, np.array([-3, 0, 0]), np.array([31, 41, 33]), (31, 41, 33))
    assert np.array_equal(padded[:, 3:28], volume) and not padded[:, :3].any() and not padded[:, 28:].any()
    small = cut(volume, np.array([0, 0, 0]), np.array([24, 40, 32]), (12, 20, 16)).astype(float)
    blocks = volume[:, :24, :40, :32].reshape(12, 2, 20, 2, 16, 2).mean((1, 3, 5))
    assert np.corrcoef(small.ravel(), blocks.ravel())[0, 1] > 0.97


def test_batches_do_not_depend_on_workers_nor_on_the_batch():
    c = settings("views.global.slices=4", "views.global.dflip=1")
    source = open_volumes(str(volumes.ANATOMICAL.parent / "anatomical.nii"), channels=1, config=c.data)
    assert len(source) == 1 and source.read(0).shape == (41, 33, 25) and source.labels is None
    batches = []
    for workers in (0, 1):
        loader = Loader(source, multicrop(c.views), seed=1, global_batch=1, workers=workers)
        batches.append([batch for (batch,) in loader.stream(0, 3)])
    for a, b in zip(*batches):
        assert [x.shape for x in a.crops] == [(2, 1, 4, 8, 8), (1, 1, 6, 6, 6)]
        assert all(torch.equal(x, y) for x, y in zip([*a.crops, *a.params], [*b.crops, *b.params]))
    again = Loader(source, multicrop(c.views), seed=1, global_batch=1).make(2, 0)
    assert torch.equal(again.crops[0], batches[0][2].crops[0])
    assert not torch.equal(batches[0][0].crops[0], batches[0][1].crops[0])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["views.global.blur=0.5", "views.global.hue=0.1"], "give views.global.blur=0 views.global.hue=0"),
        (["views.local.policy=randaugment"], "give views.local.policy=none"),
        (["eval.every=5"], "eval.every=5: k-NN is of images"),
        (["data.percentiles=[99,1]"], "two numbers from 0 to 100, the smaller first"),
        (["data.spacing=[0,1,1]"], "millimetres above 0"),
        (
            ["backbone=vit_tiny_patch16_224", "views.global.extent=[1,1]"],
            "views.global.extent, .*: of volumes; use backbone=vit3d",
        ),
    ],
)
def test_what_does_not_go_together_is_said_when_the_configuration_is_read(words: list[str], message: str):
    with pytest.raises(UserError, match=message.replace("[", r"\[")):
        settings(*words)


def test_a_window_for_each_channel() -> None:
    volume = np.stack([np.full((2, 2, 2), 5.0), np.full((2, 2, 2), 30.0)])
    both = scaled(volume, DataConfig(value_range=((0.0, 10.0), (20.0, 60.0))))
    assert both[0].max() == both[0].min() == 0.5 and both[1].max() == both[1].min() == 0.25
    assert scaled(volume, DataConfig(value_range=(0.0, 40.0)))[1, 0, 0, 0] == 0.75
