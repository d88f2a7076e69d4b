"""Evaluation images equal torchvision's Resize and CenterCrop; order, workers, and images that cannot be read."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from selfsup.data.eval_transform import eval_batches, eval_crop
from selfsup.data.sources import open_source
from selfsup.errors import UserError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.mark.parametrize("width, height", [(80, 64), (64, 80), (33, 90), (64, 64), (31, 200)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_equals_torchvision(pictures, width, height, interpolation):
    image = Image.fromarray(pictures[0]).resize((width, height))
    reference = transforms.Compose(
        [transforms.Resize(48, getattr(transforms.InterpolationMode, interpolation.upper())), transforms.CenterCrop(32)]
    )
    assert (eval_crop(image, 32, 48, interpolation) == np.asarray(reference(image))).all()


def test_dinos_protocol(flat_folder):
    source = open_source(str(flat_folder), channels=3)
    reference = transforms.Compose(
        [transforms.Resize(256, 3), transforms.CenterCrop(224), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    )
    [(images, labels, indices)] = eval_batches(
        source, size=224, resize=256, mean=MEAN, std=STD, batch_size=8, indices=[3, 0, 39], workers=0
    )
    expected = torch.stack([reference(source.read(i)) for i in (3, 0, 39)])
    assert indices.tolist() == [3, 0, 39] and labels.tolist() == [-1] * 3
    assert torch.allclose(images, expected, atol=1e-5) and images.is_contiguous() and images.dtype == torch.float32


def test_without_resize_and_without_crop(pictures):
    image = Image.fromarray(pictures[0][:28, :28])
    assert (eval_crop(image, 28, None) == pictures[0][:28, :28]).all()
    assert eval_crop(Image.fromarray(pictures[0]), 28, None).shape == (28, 28, 3)
    squeezed = eval_crop(Image.fromarray(pictures[0]), 40, None, crop=False)
    assert (squeezed == np.asarray(Image.fromarray(pictures[0]).resize((40, 40), Image.Resampling.BICUBIC))).all()
    assert eval_crop(Image.fromarray(pictures[0][:, :, 0]), 40, 48).shape == (40, 40, 1)
    with pytest.raises(UserError, match="resize=20 is smaller than size=28"):
        eval_crop(image, 28, 20)


def test_many_channels():
    array = np.random.default_rng(0).integers(0, 256, (50, 60, 13), dtype=np.uint8)
    out = eval_crop(array, 32, 40)
    for c in (0, 12):
        plane = Image.fromarray(np.ascontiguousarray(array[:, :, c]))
        assert (out[:, :, c : c + 1] == eval_crop(plane, 32, 40)).all()


def test_order_and_workers():
    source = open_source("demo:val", channels=1)
    settings = {"size": 28, "mean": (0.5,), "std": (0.25,), "batch_size": 300}
    alone = list(eval_batches(source, **settings))
    assert [len(i) for _, _, i in alone] == [300] * 6 + [200]
    assert torch.cat([i for _, _, i in alone]).tolist() == list(range(2000))
    assert (torch.cat([y for _, y, _ in alone]).numpy() == source.labels).all()
    for a, b in zip(alone, eval_batches(source, workers=2, **settings), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_images_that_cannot_be_read(tmp_path, pictures):
    for i in range(4):
        Image.fromarray(pictures[i]).save(tmp_path / f"{i}.png")
    (tmp_path / "1.png").write_bytes(b"")
    source = open_source(str(tmp_path), channels=3)
    settings = {"size": 32, "resize": 32, "mean": MEAN, "std": STD, "batch_size": 2}
    with pytest.raises(UserError, match=r"1\.png cannot be read: empty file"):
        list(eval_batches(source, **settings))
    bad = []
    batches = list(eval_batches(source, on_bad=lambda *entry: bad.append(entry), **settings))
    assert [i.tolist() for _, _, i in batches] == [[0], [2, 3]] and len(batches[0][0]) == 1
    assert len(bad) == 1 and bad[0][0].endswith("1.png")
    none = list(eval_batches(source, indices=[1], on_bad=lambda *entry: None, **settings))
    assert none == []
    with pytest.raises(UserError, match="need 3 values"):
        list(eval_batches(source, size=8, mean=(0.5,), std=(0.5,), batch_size=2))
