"""Cached teachers: what is replayed is what was said, whoever wrote it, however it was interrupted; stale ones are refused."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import selfsup
from selfsup import UserError, methods
from selfsup.config import Config, dump, load
from selfsup.data import photometric
from selfsup.data.loader import Loader
from selfsup.data.sources import open_source
from selfsup.data.views import multicrop
from selfsup.log import read_metrics
from selfsup.methods.outputs import Outputs
from selfsup.methods.teacher_cache import TeacherCache
from tests.methods.tiny import ONE_VIEW, TINY_RUN, cli, tiny_teacher, write_images

KEY = {"teacher": "a", "data": "b", "seed": 0}
LIKE = torch.zeros(1)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"), classes=4)


def config_of(images: Path, cache: Path | None, *overrides: str) -> Config:
    """20 steps of 8 of 40 images: 4 epochs."""
    options = [*TINY_RUN, "method=distill", *ONE_VIEW, "method.losses={soft: 1, patch_cosine: 1}", f"data={images}"]
    options += ["teacher=tests.methods.tiny:tiny_teacher", "precision=fp32", "steps=20"]
    options += [f"teacher.cache={cache}"] if cache else []
    return load(None, [*options, *overrides])


def said(n: int, seed: int = 0, classes: int = 5) -> Outputs:
    g = torch.Generator().manual_seed(seed)
    return Outputs(logits=torch.randn(n, classes, generator=g) * 5, patches=torch.randn(n, 3, 2, 2, generator=g))


def cache_in(folder: Path, rank: int = 0, **more) -> TeacherCache:
    options = {"images": 6, "epochs": 2, "views": 2, "rank": rank, **more}
    return TeacherCache(folder, KEY, said(1), **options)


def forbidden() -> Outputs:
    raise AssertionError("the row is there; nothing is to be computed")


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run / "metrics.jsonl")]


# ------------------------------------------------------------------------------------------------------------- rows


def test_rows_are_by_image_draw_and_view(tmp_path: Path) -> None:
    cache = cache_in(tmp_path / "c")
    everything = [cache.rows(torch.arange(6), torch.full((6,), e)) for e in range(2)]
    assert sorted(np.concatenate(everything).tolist()) == list(range(24)) and cache.count == 24
    assert (
        cache.rows(torch.tensor([4]), torch.tensor([3])).tolist()
        == cache.rows(torch.tensor([4]), torch.tensor([1])).tolist()
    )


def test_read_again_in_half_precision(tmp_path: Path) -> None:
    """Once computed, never again; what a first pass uses are the very numbers that later ones read."""
    rows, outputs = np.array([3, 20, 1]), said(3)
    first = cache_in(tmp_path / "c")(rows, lambda: outputs, LIKE)
    again = cache_in(tmp_path / "c")(rows[::-1].copy(), forbidden, LIKE)
    assert torch.equal(first.logits, outputs.logits.half().float()) and torch.equal(again.logits.flip(0), first.logits)
    assert torch.equal(again.patches.flip(0), first.patches) and first.patches.shape == (3, 3, 2, 2)


def test_a_missing_row_computes_the_whole_batch(tmp_path: Path) -> None:
    """So that numbers do not depend on which part of a batch happened to be there."""
    cache, asked = cache_in(tmp_path / "c"), []
    cache(np.array([1]), lambda: said(1), LIKE)
    cache(np.array([1, 2]), lambda: asked.append(1) or said(2, seed=1), LIKE)
    assert asked == [1] and (cache.hits, cache.misses) == (0, 2)


def test_ranks_read_one_another(tmp_path: Path) -> None:
    one, two = cache_in(tmp_path / "c", rank=0), cache_in(tmp_path / "c", rank=1)
    one(np.array([1, 2]), lambda: said(2), LIKE)
    two(np.array([5]), lambda: said(1), LIKE)
    assert torch.equal(two(np.array([2, 5]), forbidden, LIKE).logits[0], said(2).logits[1].half().float())


@pytest.mark.parametrize("name", ["logits", "patches", "checksums"])
def test_a_torn_row_is_computed_again(tmp_path: Path, name: str) -> None:
    """Whatever a power cut or a kill left of it: the checksum does not fit."""
    cache = cache_in(tmp_path / "c")
    cache(np.array([2, 3]), lambda: said(2), LIKE)
    path = tmp_path / "c" / "rank_00000" / name
    data = bytearray(path.read_bytes())
    size = len(data) // 24
    data[2 * size : 3 * size] = bytes(size)  # never reached the disk
    path.write_bytes(data)
    cache_in(tmp_path / "c")(np.array([3]), forbidden, LIKE)
    fresh, asked = cache_in(tmp_path / "c"), []
    fresh(np.array([2, 3]), lambda: asked.append(1) or said(2), LIKE)
    assert asked == [1]
    cache_in(tmp_path / "c")(np.array([2, 3]), forbidden, LIKE)  # and is whole again


def test_rows_that_are_not_finite_are_not_kept(tmp_path: Path) -> None:
    bad = said(2)
    bad.logits[1] = torch.nan
    cache_in(tmp_path / "c")(np.array([2, 3]), lambda: bad, LIKE)
    cache = cache_in(tmp_path / "c")
    cache(np.array([2]), forbidden, LIKE)
    with pytest.raises(AssertionError):
        cache(np.array([3]), forbidden, LIKE)


def test_large_values_stay_finite(tmp_path: Path) -> None:
    big = Outputs(logits=torch.full((1, 5), 1e9), patches=torch.zeros(1, 3, 2, 2))
    assert torch.isfinite(cache_in(tmp_path / "c")(np.array([0]), lambda: big, LIKE).logits).all()


def test_top_k(tmp_path: Path) -> None:
    """Indices, values and the mass of the others at the temperature."""
    from selfsup.losses.logits import keep_top

    outputs = said(2)
    cache = TeacherCache(tmp_path / "c", KEY, said(1), images=6, epochs=1, views=1, topk=2, temperature=3.0)
    cache(np.array([0, 1]), lambda: outputs, LIKE)
    found = cache(np.array([0, 1]), forbidden, LIKE)
    indices, values, rest = keep_top(outputs.logits, 2, 3.0)
    assert found.logits is None and torch.equal(found.top_indices, indices)
    torch.testing.assert_close(found.top_values, values, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.top_rest, rest)


# ------------------------------------------------------------------------------------------------------------- stale


def test_stale_caches_are_refused(images: Path, tmp_path: Path) -> None:
    """Each thing that rows depend on, changed alone, on a cache that a run has made."""
    out = iter(range(99))

    def train(*overrides: str, cache: Path = tmp_path / "c", data: Path = images, teacher=None) -> None:
        config = config_of(data, cache, "steps=1", *overrides)
        selfsup.train(config, out=tmp_path / f"run{next(out)}", teacher=teacher, quiet=True)

    train()
    more = write_images(tmp_path / "more", 44, classes=4)
    for message, change in {
        "another teacher": {"teacher": tiny_teacher(seed=1)},
        "another seed": {"overrides": ["seed=1"]},
        "other views": {"overrides": ["views.global.hflip=0.1"]},
        "another teacher.cache_epochs": {"overrides": ["teacher.cache_epochs=2"]},
        "other outputs of the teacher": {"overrides": ["method.losses={soft: 1}"]},
        "other data": {"data": more},
        "another precision": {"overrides": ["precision=bf16"]},
    }.items():
        with pytest.raises(UserError) as caught:
            train(*change.pop("overrides", []), **change)
        assert str(caught.value).startswith(f"teacher.cache={tmp_path / 'c'}: was made with") and message in str(
            caught.value
        )
    train("steps=2", "optimizer.lr=0.1", "global_batch=4")  # what rows do not depend on
    with pytest.raises(UserError, match="holds other things"):
        train(cache=images)
    (tmp_path / "c" / "cache.json").write_text("{")
    with pytest.raises(UserError, match="damaged; delete"):
        train()


class Jumps(torch.utils.data.Dataset):
    """Augments by itself, at random."""

    targets = [0, 1, 2, 3] * 4

    def __len__(self) -> int:
        return 16

    def __getitem__(self, i: int):
        return Image.fromarray(np.random.default_rng().integers(0, 255, (40, 40, 3), dtype=np.uint8)), 0


def test_random_data_are_refused(images: Path, tmp_path: Path) -> None:
    config = config_of(images, tmp_path / "c", "steps=1")
    with pytest.raises(UserError, match="is another image each time it is read"):
        selfsup.train(config, out=tmp_path / "run", dataset=Jumps(), quiet=True)


# --------------------------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize("repeat", [1, 3])
def test_augmentation_repeats_and_the_order_does_not(images: Path, repeat: int) -> None:
    views = [v for v in multicrop(config_of(images, None).views) if v.kind == "global"]
    source = open_source(str(images), channels=3)
    plain = Loader(source, views, seed=0, global_batch=8)
    loader = Loader(source, views, seed=0, global_batch=8, repeat=repeat)
    crops: dict[tuple[int, int], torch.Tensor] = {}
    for (a,), (b,) in zip(plain.stream(0, 25), loader.stream(0, 25)):
        assert torch.equal(a.ids, b.ids) and torch.equal(a.draws % repeat, b.draws)
        for n, (i, e) in enumerate(zip(b.ids.tolist(), b.draws.tolist())):
            key = (i, e)
            assert torch.equal(crops.setdefault(key, b.crops[0][:, n]), b.crops[0][:, n])
    assert len(crops) == 40 * repeat


@pytest.mark.parametrize("losses_", ["{soft: 1, patch_cosine: 1}", "{soft: 1, hint: 1, rkd_distance: 1}"])
def test_live_and_cached_are_alike(images: Path, tmp_path: Path, losses_: str) -> None:
    """Cosine above 0.999 between what is kept and what the teacher says of the same images, output by output."""
    config = config_of(images, tmp_path / "c", f"method.losses={losses_}", "teacher.cache_epochs=2")
    selfsup.train(config, out=tmp_path / "run", quiet=True)
    complete = methods.complete(config)
    method = methods.create(complete)
    source = open_source(str(images), channels=3)
    method.bind(source, method.views())
    loader = Loader(source, method.views(), seed=0, global_batch=8, repeat=2)
    worst = 1.0
    for (batch,) in loader.stream(3, 13):
        crops = photometric.apply(
            batch.crops[0], batch.params[0], config.mean, config.std, torch.device("cpu"), torch.float32
        )
        live = method.frozen(crops[0], method.wanted)
        kept = method.cache(method.cache.rows(batch.ids, batch.draws), forbidden, crops)
        assert kept.named().keys() == live.named().keys()
        for name, value in live.named().items():
            cosine = torch.cosine_similarity(value.flatten(1), kept.named()[name].flatten(1))
            worst = min(worst, cosine.min().item())
    assert worst > 0.999


def test_a_second_run_computes_nothing_and_is_the_same(images: Path, tmp_path: Path) -> None:
    """The teacher is not asked; every loss is that of the run that filled the cache, and of one with another cache."""
    first, second = (config_of(images, tmp_path / name, "teacher.cache_epochs=2") for name in "ab")
    for name, config in (("one", first), ("two", first), ("three", second)):
        selfsup.train(config, out=tmp_path / name, quiet=True)
    assert losses(tmp_path / "one") == losses(tmp_path / "two") == losses(tmp_path / "three")
    live = config_of(images, None)
    selfsup.train(live, out=tmp_path / "live", quiet=True)
    # half precision moves losses a little; the first two epochs see the same augmentation
    assert losses(tmp_path / "one")[:10] == pytest.approx(losses(tmp_path / "live")[:10], rel=2e-3)
    assert losses(tmp_path / "one")[:10] != losses(tmp_path / "live")[:10]


def test_top_k_in_a_run(images: Path, tmp_path: Path) -> None:
    config = config_of(images, tmp_path / "c", "method.losses={soft: 1, hard: 1}", "teacher.cache_topk=2")
    selfsup.train(config, out=tmp_path / "run", quiet=True)
    full = config_of(images, tmp_path / "d", "method.losses={soft: 1, hard: 1}", "teacher.cache_topk=4")
    selfsup.train(full, out=tmp_path / "full", quiet=True)
    assert 0 < losses(tmp_path / "run")[0] <= losses(tmp_path / "full")[0]  # fewer events: never a larger divergence


def test_two_processes_fill_one_cache(images: Path, tmp_path: Path) -> None:
    """Each rank writes its own file; together they hold every row, and one process finds them all."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump(config_of(images, tmp_path / "c")))
    done = cli("train", str(recipe), "--out", str(tmp_path / "two"), processes=2)
    assert done.returncode == 0, done.stderr
    sums = [np.fromfile(tmp_path / "c" / f"rank_0000{r}" / "checksums", np.uint32) != 0 for r in (0, 1)]
    assert (sums[0] | sums[1]).all() and 0 < sums[0].sum() < 40
    selfsup.train(config_of(images, tmp_path / "c"), out=tmp_path / "one", quiet=True)
    assert np.fromfile(tmp_path / "c" / "rank_00000" / "checksums", np.uint32).astype(bool).tolist() == sums[0].tolist()
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), rel=1e-3)


def test_killed_in_the_middle(images: Path, tmp_path: Path) -> None:
    """kill -9 while rows are written: the run resumes to the same bits, and each row that counts is the one it should be."""
    steps = ["checkpoint.every=3", "steps=40", "log_every=1", "teacher.cache_epochs=4"]
    selfsup.train(config_of(images, tmp_path / "whole_c", *steps), out=tmp_path / "whole", quiet=True)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump(config_of(images, tmp_path / "c", *steps)))
    command = [sys.executable, "-m", "selfsup.cli", "train", str(recipe), "--out", str(tmp_path / "run")]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env={**os.environ})
    sums = tmp_path / "c" / "rank_00000" / "checksums"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if sums.exists() and np.count_nonzero(np.fromfile(sums, np.uint32)) > 40:
            break
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    filled = np.count_nonzero(np.fromfile(sums, np.uint32))
    assert 40 < filled < 160
    done = cli("train", str(recipe), "--out", str(tmp_path / "run"), "--resume")
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    for name in ("logits", "patches", "checksums"):
        mine, other = ((tmp_path / c / "rank_00000" / name).read_bytes() for c in ("c", "whole_c"))
        assert mine == other
    assert json.loads((tmp_path / "c" / "cache.json").read_text())["images"] == 40
