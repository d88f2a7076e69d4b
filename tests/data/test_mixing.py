"""Mixup, CutMix and RICAP equal torchvision's, timm's and the papers' for the same draws; draws follow their distributions."""

import itertools

import numpy as np
import pytest
import timm.data.mixup
import torch
from scipy import stats
from torch.nn.functional import one_hot
from torchvision.transforms import v2

from selfsup.config import MixConfig
from selfsup.data.batch import Split
from selfsup.data.mixing import Mixer, Pairs, Patches, cutmix_boxes
from selfsup.errors import UserError
from selfsup.schedules import Plan

CLASSES = 11
NAMES = ("mixup", "cutmix", "mixup+cutmix", "ricap")
SEED = 5


def encode(labels):
    return one_hot(labels, CLASSES).float()


def batch(count=8, channels=3, size=12, dtype=torch.float32):
    """Images, labels and places."""
    generator = torch.Generator().manual_seed(count)
    images = torch.randn(count, channels, size, size, generator=generator).to(dtype)
    return images, torch.randint(0, CLASSES, (count,), generator=generator), torch.arange(count)


def mixer(name, global_batch=8, seed=SEED, **options):
    return Mixer(MixConfig(name=name, **options), seed, global_batch)


def first(mixer, kind, positions, size, where):
    """A step whose draw is as wanted, and the draw."""
    for step in range(200):
        drawn = mixer.at(positions, step, size)
        if isinstance(drawn, kind) and where(drawn):
            return step, drawn
    raise AssertionError("no such draw")


def backwards(sources):
    """Images in such an order that the one before each is its partner."""
    walk = [0]
    while len(walk) < len(sources):
        walk.append(int(sources[walk[-1], 1]))
    assert sorted(walk) == list(range(len(sources)))  # one cycle: nobody is its own partner
    return walk[::-1]


def interior(drawn):
    """A box that is neither empty nor all."""
    return 0.1 < float(drawn.weights[0, 1]) < 0.9


# ------------------------------------------------------------------------------------------------------------------ oracles


def test_mixup_equals_torchvision(monkeypatch):
    images, labels, positions = batch()
    ours = mixer("mixup")
    step, drawn = first(ours, Pairs, positions, 12, interior)
    lam = float(drawn.weights[0, 0])
    theirs = v2.MixUp(num_classes=CLASSES)
    monkeypatch.setattr(theirs, "make_params", lambda inputs: {"lam": lam})
    order = backwards(drawn.sources)
    expected, said = theirs(images[order], labels[order])
    mixed, target = ours(images, labels, positions, step, encode)
    torch.testing.assert_close(mixed[order], expected)
    torch.testing.assert_close(target[order], said)
    assert not torch.allclose(mixed, images, atol=0.1)


def test_cutmix_equals_torchvision(monkeypatch):
    images, labels, positions = batch()
    ours = mixer("cutmix")
    step, drawn = first(ours, Pairs, positions, 12, interior)
    top, left, bottom, right = drawn.boxes[0].tolist()
    params = {"box": (left, top, right, bottom), "lam_adjusted": 1 - (bottom - top) * (right - left) / 144}
    theirs = v2.CutMix(num_classes=CLASSES)
    monkeypatch.setattr(theirs, "make_params", lambda inputs: params)
    order = backwards(drawn.sources)
    expected, said = theirs(images[order], labels[order])
    mixed, target = ours(images, labels, positions, step, encode)
    assert torch.equal(mixed[order], expected)  # copied, not computed
    torch.testing.assert_close(target[order], said)


def test_boxes_equal_torchvisions(monkeypatch):
    theirs = v2.CutMix(num_classes=CLASSES)
    rng = np.random.default_rng(0)
    for size in (12, 31, 224):
        lam, centre = rng.random(300), rng.random((300, 2))
        for value, (y, x), box in zip(lam, centre, cutmix_boxes(lam, centre, size)):
            drawn = iter([torch.tensor([int(x * size)]), torch.tensor([int(y * size)])])
            monkeypatch.setattr(torch, "randint", lambda *a, drawn=drawn, **k: next(drawn))
            monkeypatch.setattr(
                theirs._dist, "sample", lambda shape, value=value: torch.tensor([value], dtype=torch.float64)
            )
            left, top, right, bottom = theirs.make_params([torch.empty(1, 3, size, size)])["box"]
            assert box.tolist() == [top, left, bottom, right]


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_equals_timm(monkeypatch, name):
    """timm turns the batch round, which makes pairs of two; with smoothed labels, which the caller makes."""
    images, labels, positions = batch(2)
    ours = mixer(name, global_batch=2, group=2)
    step, drawn = first(ours, Pairs, positions, 12, interior)
    top, left, bottom, right = drawn.boxes[0].tolist()
    theirs = timm.data.mixup.Mixup(label_smoothing=0.1, num_classes=CLASSES)
    monkeypatch.setattr(theirs, "_params_per_batch", lambda: (float(drawn.weights[0, 0]), name == "cutmix"))
    monkeypatch.setattr(timm.data.mixup, "rand_bbox", lambda *a, **k: (top, bottom, left, right))
    expected, said = theirs(images.clone(), labels)
    mixed, target = ours(images, labels, positions, step, lambda labels: 0.9 * encode(labels) + 0.1 / CLASSES)
    torch.testing.assert_close(mixed, expected)
    torch.testing.assert_close(target, said)


def told(batch, size):
    """Images that say of each pixel from which image, row and column it is: [B,3,S,S]."""
    row, column = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    return torch.stack([torch.stack([torch.full((size, size), b), row, column]) for b in range(batch)]).float()


@pytest.mark.parametrize("mode", ["batch", "group"])
def test_ricap_is_the_papers(mode):
    """Four crops of four images about a boundary, none beyond its image; labels by the pixels that are there."""
    count, size, group = 16, 20, 4
    ours, images = mixer("ricap", count, mode=mode, group=group, ricap_alpha=1.0), told(count, size)
    labels, positions = torch.arange(count) % CLASSES, torch.arange(count)
    boundaries = set()
    for step in range(20):
        drawn = ours.at(positions, step, size)
        assert isinstance(drawn, Patches)
        mixed, target = ours(images, labels, positions, step, encode)
        assert mixed.shape == images.shape
        for b in range(count):
            h, w = drawn.boundary[b].tolist()
            boundaries.add((step, h, w))
            said, seen = torch.zeros(CLASSES), []
            for rows, columns in itertools.product((slice(0, h), slice(h, size)), (slice(0, w), slice(w, size))):
                piece = mixed[b][:, rows, columns].long()  # [3,height,width]: image, row, column
                if piece.numel() == 0:
                    continue
                image, top, left = piece[:, 0, 0].tolist()
                assert (piece[0] == image).all() and image // group == b // group
                crop = images[image][:, top : top + piece.shape[1], left : left + piece.shape[2]]
                assert torch.equal(piece.float(), crop)
                said[labels[image]] += piece[0].numel() / size**2
                seen.append(image)
            assert len(set(seen)) == len(seen)  # four different images
            torch.testing.assert_close(target[b], said)
            assert float(target[b].sum()) == pytest.approx(1, abs=1e-6)
    assert len({step for step, _, _ in boundaries}) == 20
    assert (len(boundaries) > 40) == (mode == "group")  # one boundary a step, or one a group


def test_crops_of_ricap_may_be_anywhere():
    """Where a piece is cut from its image is uniform over what fits."""
    ours, size = mixer("ricap", 8, group=8, ricap_alpha=5.0), 10_000
    found = []
    for step in range(1500):
        drawn = ours.at(torch.arange(8), step, size)
        origin = torch.stack([torch.zeros(2).long(), drawn.boundary[0] * torch.tensor([0, 1])])  # of pieces 0 and 1
        extent = torch.stack([drawn.boundary[0], torch.tensor([0, size]) + drawn.boundary[0] * torch.tensor([1, -1])])
        start = drawn.shift[0, :2] + origin
        assert (start >= 0).all() and (start + extent <= size).all()
        found.append((start / (size - extent)).numpy())
    values = np.stack(found)  # [steps,2,2]
    for k in range(2):
        for axis in range(2):
            assert stats.kstest(values[:, k, axis], "uniform").pvalue > 1e-4
    assert abs(np.corrcoef(values.reshape(-1, 4).T) - np.eye(4)).max() < 0.1


# ------------------------------------------------------------------------------------------------------------ distributions


@pytest.mark.parametrize("alpha", [0.2, 0.8, 3.0])
def test_lambda_of_mixup_is_beta(alpha):
    ours = mixer("mixup", 8192, mode="group", mixup_alpha=alpha)
    drawn = ours.at(torch.arange(8192), 0, 8)
    lam = drawn.weights[::8, 0].double().numpy()
    assert len(lam) == 1024 and stats.kstest(lam, stats.beta(alpha, alpha).cdf).pvalue > 1e-4
    assert stats.kstest(lam, stats.beta(2 * alpha, 2 * alpha).cdf).pvalue < 1e-3  # the test can fail
    torch.testing.assert_close(drawn.shares, drawn.weights[:, 1])


def test_areas_of_cutmix_are_torchvisions():
    drawn = mixer("cutmix", 8192, mode="group", group=4).at(torch.arange(8192), 0, 64)
    torch.manual_seed(0)
    theirs = v2.CutMix(num_classes=CLASSES)
    image = torch.empty(1, 3, 64, 64)
    expected = [theirs.make_params([image]) for _ in range(2000)]
    ours = drawn.weights[::4, 0].numpy()
    assert stats.ks_2samp(ours, [p["lam_adjusted"] for p in expected]).pvalue > 1e-4
    for k, place in enumerate((1, 0, 3, 2)):  # theirs are left, top, right, bottom
        assert stats.ks_2samp(drawn.boxes[::4, k].numpy(), [p["box"][place] for p in expected]).pvalue > 1e-4


def test_the_boundary_of_ricap_is_beta():
    size = 10**8
    drawn = mixer("ricap", 16_384, mode="group").at(torch.arange(16_384), 0, size)
    boundary = drawn.boundary[::8].double().numpy() / size
    for axis in range(2):
        assert stats.kstest(boundary[:, axis], stats.beta(0.3, 0.3).cdf).pvalue > 1e-4
        assert stats.kstest(boundary[:, axis], "uniform").pvalue < 1e-4
    assert abs(np.corrcoef(boundary.T)[0, 1]) < 0.1


def test_partners_are_any_of_the_group():
    """Each other place equally often, and RICAP's four are different."""
    ours = mixer("ricap", 800, group=5)
    sources = torch.cat([ours.at(torch.arange(800), step, 8).sources for step in range(10)]).view(10, 160, 5, 4)
    local = sources - torch.arange(0, 800, 5)[:, None, None]
    assert (local[..., 0] == torch.arange(5)).all() and local.min() == 0 and local.max() == 4
    assert (local.sort(-1).values.diff(dim=-1) > 0).all()
    for place in range(5):
        counts = torch.bincount(local[:, :, place, 1].flatten(), minlength=5).double() / 1600
        assert counts[place] == 0 and (counts - 0.25).abs().max() == 0.25
        assert (np.delete(counts.numpy(), place) - 0.25).max() < 0.05


@pytest.mark.parametrize("mode", ["batch", "group"])
def test_how_often_it_is_which(mode):
    ours = mixer("mixup+cutmix", 800, mode=mode, probability=0.6, switch=0.3)
    steps = 300 if mode == "batch" else 3
    kinds = []
    for step in range(steps):
        drawn = ours.at(torch.arange(800), step, 512)
        for group in range(1 if mode == "batch" else 100):
            cut = drawn is not None and bool(drawn.boxes[8 * group].any())
            mixed = drawn is not None and float(drawn.shares[8 * group]) > 0
            assert not (cut and mixed)
            kinds.append(1 if cut else 2 if mixed else 0)
    none, cut, mixed = np.bincount(kinds, minlength=3) / len(kinds)
    assert none == pytest.approx(0.4, abs=0.1) and cut == pytest.approx(0.18, abs=0.08)
    assert mixed == pytest.approx(0.42, abs=0.1)


# ------------------------------------------------------------------------------------------------------- whoever computes it


@pytest.mark.parametrize("mode", ["batch", "group"])
@pytest.mark.parametrize("name", NAMES)
def test_parts_are_the_whole_bit_for_bit(name, mode):
    images, labels, positions = batch(48)
    ours = mixer(name, 48, mode=mode)
    wholes = {step: ours(images, labels, positions, step, encode) for step in (0, 3, 7)}
    assert any(not torch.equal(whole, images) for whole, _ in wholes.values())
    for step, (whole, targets) in wholes.items():
        for world, accumulate in ((2, 1), (1, 3), (3, 2), (6, 1)):
            seen = []
            for rank, micro in itertools.product(range(world), range(accumulate)):
                places = torch.from_numpy(Split(48, accumulate, rank, world).positions(micro))
                part, said = mixer(name, 48, mode=mode)(images[places], labels[places], places, step, encode)
                assert torch.equal(part, whole[places]) and torch.equal(said, targets[places])
                seen += places.tolist()
            assert sorted(seen) == list(range(48))


@pytest.mark.parametrize("name", NAMES)
def test_a_function_of_seed_and_step(name):
    images, labels, positions = batch(24)
    before = images.clone(), torch.get_rng_state(), np.random.get_state()[1].copy()
    outputs = [
        mixer(name, 24, seed=seed, probability=0.999)(images, labels, positions, step, encode)
        for seed, step in ((1, 3), (1, 3), (2, 3), (1, 4))
    ]
    assert torch.equal(outputs[0][0], outputs[1][0]) and torch.equal(outputs[0][1], outputs[1][1])
    for other in outputs[2:]:
        assert not torch.equal(outputs[0][0], other[0]) and not torch.equal(outputs[0][1], other[1])
    assert torch.equal(images, before[0])
    assert torch.equal(torch.get_rng_state(), before[1]) and (np.random.get_state()[1] == before[2]).all()


@pytest.mark.parametrize("mode", ["batch", "group"])
@pytest.mark.parametrize("name", NAMES)
def test_views_are_mixed_alike(name, mode):
    images, labels, positions = batch(16)
    views = torch.stack([images, images.flip(-1) + 1])  # [2,B,C,S,S]
    ours = mixer(name, 16, mode=mode)
    mixed, targets = ours(views, labels, positions, 2, encode)
    assert mixed.shape == views.shape
    for view, got in zip(views, mixed, strict=True):
        alone, said = ours(view, labels, positions, 2, encode)
        assert torch.equal(got, alone) and torch.equal(said, targets)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_other_types_than_float32(name, dtype):
    images, labels, positions = batch(8, dtype=dtype)
    ours = mixer(name)
    for step in range(4):
        mixed, _ = ours(images, labels, positions, step, encode)
        expected, _ = ours(images.float(), labels, positions, step, encode)
        assert mixed.dtype == dtype
        torch.testing.assert_close(mixed.float(), expected.to(dtype).float(), atol=1e-6, rtol=1e-6)
    targets = ours(images, labels, positions, 0, lambda labels: encode(labels).double())[1]
    assert targets.dtype == torch.float64


@pytest.mark.parametrize("channels, size", [(1, 28), (13, 9)])
@pytest.mark.parametrize("name", NAMES)
def test_any_channels_and_sizes(name, channels, size):
    images, labels, positions = batch(8, channels, size)
    mixed, targets = mixer(name)(images, labels, positions, 1, encode)
    assert mixed.shape == images.shape and torch.isfinite(mixed).all()
    torch.testing.assert_close(targets.sum(1), torch.ones(8))
    each = torch.stack([mixer(name)(images[:, c : c + 1], labels, positions, 1, encode)[0] for c in range(channels)], 2)
    assert torch.equal(each[:, 0], mixed)


@pytest.mark.parametrize("mode", ["batch", "group"])
@pytest.mark.parametrize("name", NAMES)
def test_nothing_waits_for_the_device(name, mode):
    """On the meta device there is nothing that could be read."""
    images, labels, positions = (t.to("meta") for t in batch(16))
    mixed, targets = mixer(name, 16, mode=mode)(
        images, labels, positions, 0, lambda labels: torch.empty(len(labels), CLASSES, device="meta")
    )
    assert mixed.shape == images.shape and targets.shape == (16, CLASSES) and mixed.is_meta


# --------------------------------------------------------------------------------------------------------------- on and off


@pytest.mark.parametrize("options", [{"name": "none"}, *({"name": n, "probability": 0.0} for n in NAMES)])
def test_off(options):
    images, labels, positions = batch()
    mixed, targets = Mixer(MixConfig(**options), 0, 8)(images, labels, positions, 0, encode)
    assert mixed is images and torch.equal(targets, encode(labels))
    assert Mixer(MixConfig(), 0, 8).schedules(Plan(100, 80, 8)) == {}


@pytest.mark.parametrize("name", NAMES)
def test_groups_that_are_left_alone(name):
    images, labels, positions = batch(64)
    mixed, targets = mixer(name, 64, mode="group", probability=0.5)(images, labels, positions, 1, encode)
    alone = [torch.equal(a, b) for a, b in zip(mixed.split(8), images.split(8))]
    assert alone == [torch.equal(a, b) for a, b in zip(targets.split(8), encode(labels).split(8))]
    assert 0 < sum(alone) < 8


def test_until():
    ours = mixer("mixup", until="25%")
    schedule = ours.schedules(Plan(steps=100, images=800, global_batch=8))["mix"]
    assert [schedule(step) for step in (0, 24, 25, 99)] == [1, 1, 0, 0]
    images, labels, positions = batch()
    assert ours(images, labels, positions, 30, encode, on=schedule(30))[0] is images
    assert ours(images, labels, positions, 10, encode, on=schedule(10))[0] is not images
    assert (
        mixer("mixup").schedules(Plan(100, 80, 8)) == {}
        and mixer("none", until="25%").schedules(Plan(100, 80, 8)) == {}
    )


# ---------------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "name, group, micro, expected",
    [
        ("mixup", 8, 12, "a process computes 12 images at a time, .*; use mix.group=6, or"),
        ("mixup", 8, 4, "use mix.group=4"),
        ("cutmix", 8, 1, "mix.name=cutmix needs 2 or more images; lower accumulate"),
        ("cutmix", 8, 7, "use mix.group=7"),
        ("ricap", 8, 3, "mix.name=ricap needs 4 or more images"),
        ("ricap", 8, 2, "mix.name=ricap needs 4 or more images"),
        ("ricap", 16, 24, "use mix.group=12"),
    ],
)
def test_groups_that_do_not_fit(name, group, micro, expected):
    ours = mixer(name, 48, group=group)
    with pytest.raises(UserError, match=f"^mix.group={group}: .*{expected}"):
        ours.check(micro)
    images, labels, positions = batch(micro)
    with pytest.raises(UserError, match=r"mix\.group"):
        ours(images, labels, positions, 0, encode)


def test_groups_that_fit():
    for micro in (8, 16, 64):
        mixer("ricap").check(micro)
    mixer("none").check(3)


@pytest.mark.parametrize("places", [[0, 2, 4, 6, 8, 10, 12, 14], [4, 5, 6, 7, 8, 9, 10, 11], [1, 0, 2, 3, 4, 5, 6, 7]])
def test_places_that_are_no_groups(places):
    images, labels, _ = batch()
    with pytest.raises(ValueError, match="whole groups of neighbours"):
        mixer("mixup", 16)(images, labels, torch.tensor(places), 0, encode)
