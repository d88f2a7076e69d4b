"""Policies are torchvision's, drawn from (seed, epoch, image, view) alone, whoever makes the batch."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

from selfsup.config import Crops, ViewsConfig, load
from selfsup.data import policies
from selfsup.data.loader import Loader
from selfsup.data.policies import Policy
from selfsup.data.sources import open_source, wrap_dataset
from selfsup.data.views import multicrop
from selfsup.errors import UserError
from selfsup.randomness import mix
from tests.data.test_loader import assert_equal, joined

BILINEAR = {"interpolation": InterpolationMode.BILINEAR, "fill": 128}
THEIRS = {
    "randaugment": (v2.RandAugment(3, 15, **BILINEAR), {"policy_ops": 3, "policy_magnitude": 15}),
    "autoaugment": (v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10, **BILINEAR), {"policy_table": "cifar10"}),
    "trivialaugment": (
        v2.TrivialAugmentWide(fill=[7, 8, 9]),
        {"policy_fill": (7, 8, 9), "policy_interpolation": "nearest"},
    ),
}
NAMES = pytest.mark.parametrize("name", THEIRS)


def views(policy, size=28, **options):
    crops = {"size": size, "count": 2, "policy": policy, **options}
    local = {"count": 1, "size": 16, "scale": (0.3, 0.6), "policy": "none"}
    return multicrop(ViewsConfig(**{"global": Crops(**crops), "local": Crops(**local)}))


def crops_from(pictures, count=12):
    return np.stack([np.asarray(Image.fromarray(p).resize((48, 48))) for p in pictures[:count]])


def changed(view, crops, seed=3, epoch=2, ids=None):
    out = crops.copy()
    n = len(crops)
    Policy(view, crops.shape[-1])(out, seed, np.full(n, epoch), np.arange(n) if ids is None else ids)
    return out


def steps(source, start, end, views, **options):
    return list(Loader(source, views, seed=1, global_batch=24, **options).stream(start, end))


@NAMES
def test_equals_torchvision(pictures, name):
    """Given the same draws: those of its own code under a generator that is seeded for each crop."""
    theirs, options = THEIRS[name]
    view = views(name, 48, **options)[1]
    crops = crops_from(pictures)
    got = changed(view, crops)
    for b, image in enumerate(crops):
        torch.manual_seed(mix(3, policies._TAG, view.number, 2, b))
        torch.rand(())  # whether at all
        assert (got[b] == np.asarray(theirs(Image.fromarray(image)))).all()
    assert (got != crops).any(axis=(1, 2, 3)).sum() >= 8


@NAMES
def test_grey_images(pictures, name):
    crops = crops_from(pictures)[..., :1].copy()
    got = changed(views(name, 48)[0], crops)
    assert got.shape == crops.shape and got.dtype == np.uint8 and (got != crops).any(axis=(1, 2, 3)).sum() >= 5


def test_a_pure_function_of_its_key(pictures):
    crops = crops_from(pictures)
    view, other = views("randaugment", 48)[:2]
    once = changed(view, crops)
    order = np.random.default_rng(0).permutation(12)
    assert (changed(view, crops[order], ids=order) == once[order]).all()
    assert (changed(view, crops[4:5], ids=np.array([4])) == once[4:5]).all()
    for again in (changed(view, crops, seed=4), changed(view, crops, epoch=3), changed(other, crops)):
        assert (again != once).any(axis=(1, 2, 3)).sum() >= 8


def test_the_global_generator_is_left_alone(pictures):
    torch.manual_seed(9)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    changed(views("trivialaugment", 48)[0], crops_from(pictures))
    assert torch.equal(torch.get_rng_state(), before[0]) and (np.random.get_state()[1] == before[1]).all()


def test_probability(pictures):
    crops = np.repeat(crops_from(pictures), 20, axis=0)
    always, half, never = (
        (changed(views("randaugment", 48, policy_probability=p)[0], crops) != crops).any(axis=(1, 2, 3))
        for p in (1.0, 0.5, 0.0)
    )
    assert not never.any() and half.mean() == pytest.approx(always.mean() / 2, abs=0.12)
    both = (changed(views("randaugment", 48, policy_probability=0.5)[0], crops)
            == changed(views("randaugment", 48)[0], crops)).all(axis=(1, 2, 3))  # fmt: skip
    assert both[half].all()  # those that get one get the same


def test_what_is_left_empty_is_filled(pictures):
    crops = np.full((60, 48, 48, 3), 200, np.uint8)
    corners = [changed(views("trivialaugment", 48, policy_fill=fill)[0], crops)[:, 0, 0] for fill in (128, (1, 2, 3))]
    assert (corners[0] == 128).all(1).any() and (corners[1] == (1, 2, 3)).all(1).any()


# ------------------------------------------------------------------------------------------------------------------ batches


@pytest.mark.parametrize("channels", [1, 3])
def test_any_number_of_workers_ranks_and_micro_batches(channels):
    source = open_source("demo:val", channels=channels)
    chosen = views("randaugment")
    whole = steps(source, 0, 3, chosen)
    assert_equal(whole[2][0], steps(source, 2, 3, chosen, workers=2)[0][0])
    for world, accumulate in ((2, 1), (2, 3)):
        parts = [
            b for r in range(world) for b in steps(source, 2, 3, chosen, world=world, rank=r, accumulate=accumulate)[0]
        ]
        assert_equal(whole[2][0], joined(parts))
    plain = steps(source, 0, 3, views("none"))
    for with_policy, without in zip(whole, plain, strict=True):
        assert not torch.equal(with_policy[0].crops[0], without[0].crops[0])
        assert torch.equal(with_policy[0].crops[1], without[0].crops[1])  # local ones have none
        assert all(torch.equal(a, b) for a, b in zip(with_policy[0].params, without[0].params, strict=True))


def test_cropping_in_chunks_changes_nothing(flat_folder, monkeypatch):
    from selfsup.data import batch as module

    source, chosen = open_source(str(flat_folder), channels=3), views("autoaugment")
    [[whole]] = steps(source, 0, 1, chosen)
    monkeypatch.setattr(module, "_PIXELS_AT_ONCE", 12_000)
    [[pieces]] = steps(source, 0, 1, chosen)
    assert_equal(whole, pieces)


def test_torchvision_is_imported_only_for_a_policy_and_before_the_workers():
    script = """
import sys
from selfsup.config import Crops, ViewsConfig
from selfsup.data.loader import Loader
from selfsup.data.sources import open_source
from selfsup.data.views import multicrop
source = open_source("demo:val", channels=1)
for policy in ("none", "randaugment"):
    views = multicrop(ViewsConfig(**{"global": Crops(size=8, policy=policy), "local": Crops(count=0)}))
    loader = Loader(source, views, seed=0, global_batch=8)
    print("torchvision" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100)
    assert done.stdout.split() == ["False", "True"], done.stderr


# ---------------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("channels", [2, 4, 13])
def test_other_channels_are_refused(channels):
    source = wrap_dataset(torch.utils.data.TensorDataset(torch.rand(30, channels, 20, 24)), channels=channels)
    with pytest.raises(
        UserError, match=rf"^views\.global\.policy=randaugment is for .* 1 or 3 .* {channels}; use .*policy=none"
    ):
        Loader(source, views("randaugment"), seed=0, global_batch=8)
    with pytest.raises(UserError, match=rf"views\.local\.policy=autoaugment .* seen backbone\.in_chans={channels}"):
        load(None, ["views.local.policy=autoaugment", f"backbone.in_chans={channels}"])


def test_levels_for_other_channels_are_refused():
    source = open_source("demo:val", channels=1)
    with pytest.raises(UserError, match=r"views\.global\.policy_fill holds 3 levels for 1 channels"):
        Loader(source, views("randaugment", policy_fill=(1, 2, 3)), seed=0, global_batch=8)
