"""Rows that are not the step, at tiny sizes: they run, their sides agree, and a side that is wrong is found out."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import compare, counts, growth, loader, measure_growth, photographs
from benchmarks.case import CASES, Case
from benchmarks.features import timed
from benchmarks.sides import Machine
from selfsup.data.views import P

TINY = {
    "linear": {"images": 4, "classes": 2, "rates": 2, "backbone": "vit_tiny_patch16_224", "size": 224},
    "linear-cached-10": {"images": 60, "width": 8, "classes": 4, "rates": 3, "poolings": 2, "epochs": 2},
    "knn-search": {"bank": 600, "queries": 40, "width": 24, "classes": 7, "k": [3, 10]},
    "features": {"images": 4, "batch": 2, "backbone": "vit_tiny_patch16_224", "size": 224, "workers": 0},
}


def case(name: str) -> Case:
    found = next(c for c in CASES if c.name == name)
    return replace(found, options=TINY.get(name, found.options))


def answers(name: str, folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], Case]:
    """What both sides of a row say, in this process."""
    this = case(name)
    module = this.load()
    module.inputs(this.options, folder)
    sides = [module.SIDES[side](this.options, folder) for side in (this.peer, "ours")]
    peer = sides[0].answer({})
    ours = sides[1].answer(peer)
    sides[0].run(1)
    sides[1].run(1)
    return ours, peer, this


@pytest.mark.parametrize("name", ["linear-cached-10", "knn-search", "features"])
def test_sides_agree_and_a_wrong_one_is_seen(name: str, tmp_path: Path):
    ours, peer, this = answers(name, tmp_path)
    differ = this.load().differ
    assert differ(this.options, ours, peer) == ""
    key = next(iter(peer))
    wrong = dict(ours)
    wrong[key] = ours[key] * 1.01 if ours[key].is_floating_point() else (ours[key] + 1) % 600
    assert differ(this.options, wrong, peer) != ""


def test_votes_are_compared():
    from benchmarks.knn import differ

    right = torch.tensor([[0.5, 0.9], [0.6, 0.9]], dtype=torch.float64)
    assert differ({}, {"accuracy": right}, {"accuracy": right}) == ""
    assert "differ" in differ({}, {"accuracy": right + 0.002}, {"accuracy": right})
    perfect = torch.ones(2, 2, dtype=torch.float64)
    assert "hide" in differ({}, {"accuracy": perfect}, {"accuracy": perfect}), "too easy to find a wrong vote"


def test_draws_of_torchvision_are_recorded_and_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """dino's operations, put together here from torchvision's, drawn at random; and our crops for the same draws."""
    import random
    import sys
    import types

    from PIL import ImageFilter, ImageOps
    from torchvision import datasets, transforms

    utils = types.ModuleType("utils")
    utils.ImageFilter, utils.ImageOps = ImageFilter, ImageOps  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "utils", utils)
    photographs.write(tmp_path / "images", 4)
    jitter = transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)

    def crops(image):
        out = []
        for size in (224, 224, 96, 96):
            x = transforms.RandomResizedCrop(size, scale=(0.1, 1), interpolation=transforms.InterpolationMode.BICUBIC)(
                image
            )
            x = transforms.RandomGrayscale(0.3)(jitter(transforms.RandomHorizontalFlip(0.5)(x)))
            x = x.filter(utils.ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2)))
            x = utils.ImageOps.solarize(x) if random.random() < 0.3 else x
            out.append(transforms.Normalize(loader.MEAN, loader.STD)(transforms.ToTensor()(x)))
        return out

    options = {"images": 4, "batch": 2, "photometric": True}
    peer = loader.Dino.__new__(loader.Dino)
    peer.dataset = datasets.ImageFolder(str(tmp_path / "images"), transform=crops)
    said = peer.answer({})
    ours = loader.Ours(options, tmp_path)
    ours.run(1)
    assert loader.differ(options, ours.answer(said), said) == ""
    moved = dict(said)
    moved["global_params"] = said["global_params"] + torch.eye(P)[0] * 3  # boxes three pixels to the right
    assert "levels" in loader.differ(options, ours.answer(moved), said)


@pytest.mark.slow
def test_a_row_from_end_to_end(tmp_path: Path):
    """Processes, agreement, timing in turn, memory; too few pairs to claim."""
    this = case("linear-cached-10")
    result = compare.measure(this, Machine({}, 1, 2, tmp_path), lambda share: None)
    assert result.ratio is not None and result.ratio > 0 and not result.claims, result
    assert result.peak_bytes is not None and result.details["flops"]["ours"] > 0
    json.dumps(result.json())


def test_sides_that_differ_are_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compare, "answers", lambda *a: ("the head 0 0.1 is off by 1.0e+00", 0))
    result = compare.measure(case("linear-cached-10"), Machine({}, 1, 2, tmp_path))
    assert result.claim.startswith("not the same work, nothing timed") and result.ratio is None


def test_syncs_are_counted():
    x = torch.arange(4.0)
    found = counts.count_syncs(lambda: (x.sum().item(), bool(x[0] > 0), x.nonzero(), x + 1))
    assert found == {"_local_scalar_dense": 2, "nonzero": 1}
    assert counts.count_syncs(lambda: x.exp_()) == {}


def test_exponents():
    sizes = [10, 100, 1000]
    assert growth.exponent(sizes, [5, 5, 5]) == pytest.approx(0)
    assert growth.exponent(sizes, [2, 20, 200]) == pytest.approx(1)
    assert growth.exponent(sizes, [n**1.5 for n in sizes]) == pytest.approx(1.5)
    assert growth.exponent([1, 2], [1, 2]) is None and growth.exponent(sizes, [0, 0, 0]) is None


@pytest.mark.slow
def test_growth_is_measured_and_drawn(tmp_path: Path):
    tiny = growth.Growth("growth-knn", "knn", "bank", "bank images", (200, 400, 800))
    result = tiny.measure(Machine({}, 1, 1, tmp_path, tmp_path / "pictures"), lambda share: None)
    assert set(result.details["exponents"]) == {"seconds", "MB above the bank"}
    assert "exponent" in result.claim and (tmp_path / "pictures/growth-knn.png").stat().st_size > 5000


def test_an_index_of_many_lines(tmp_path: Path):
    found = measure_growth.images(300, tmp_path)["costs"]
    assert found["MB of a worker's own"] > 1 and found["seconds to first batch"] > 0


def test_waiting_is_what_the_iterator_takes(monkeypatch: pytest.MonkeyPatch):
    clock = iter(np.arange(100.0))
    monkeypatch.setattr("benchmarks.features.time.perf_counter", lambda: float(next(clock)))
    assert list(timed(iter("abc"))) == [("a", 1.0), ("b", 1.0), ("c", 1.0)]


def test_photographs_differ(tmp_path: Path):
    photographs.write(tmp_path, 9, classes=3)
    files = sorted(tmp_path.rglob("*.jpg"))
    assert len(files) == 9 and len({f.read_bytes() for f in files}) == 9 and len(list(tmp_path.iterdir())) == 3
