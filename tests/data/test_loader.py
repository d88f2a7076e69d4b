"""The same batches whoever makes them, from any step on, in any number of parts; and what happens when things break."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from selfsup.config import Crops, ViewsConfig
from selfsup.data.decode import BadImage
from selfsup.data.loader import Batch, Loader
from selfsup.data.sources import Source, open_source, wrap_dataset
from selfsup.data.views import ViewParams, crop, multicrop, sample_params
from selfsup.errors import UserError

VIEWS = multicrop(
    ViewsConfig(**{"global": Crops(size=28, blur=(1.0, 0.1)), "local": Crops(count=3, size=16, scale=(0.05, 0.4))})
)


@pytest.fixture(scope="module")
def source():
    return open_source("demo:val", channels=1)


def steps(source, start, end, views=VIEWS, **options):
    options = {"seed": 1, "global_batch": 24, **options}
    return list(Loader(source, views, **options).stream(start, end))


def assert_equal(a, b):
    for x, y in zip(
        [*a.crops, *a.params, a.ids, a.positions, a.labels], [*b.crops, *b.params, b.ids, b.positions, b.labels]
    ):
        assert x.dtype == y.dtype and torch.equal(x, y)
    assert a.bad == b.bad


def joined(batches):
    """Micro-batches of one step, over ranks and accumulation, as one batch in the order of positions."""
    order = torch.cat([b.positions for b in batches]).argsort()

    def along(values, dim):
        return torch.cat(values, dim).index_select(dim, order)

    first = batches[0]
    return Batch(
        crops=[along([b.crops[r] for b in batches], 1) for r in range(len(first.crops))],
        params=[along([b.params[r] for b in batches], 1) for r in range(len(first.params))],
        ids=along([b.ids for b in batches], 0),
        positions=along([b.positions for b in batches], 0),
        labels=along([b.labels for b in batches], 0),
        bad=[entry for b in batches for entry in b.bad],
    )


def test_what_a_batch_holds(source):
    [[batch]] = steps(source, 0, 1)
    assert [c.shape for c in batch.crops] == [(2, 24, 1, 28, 28), (3, 24, 1, 16, 16)]
    assert all(c.dtype == torch.uint8 for c in batch.crops) and all(p.dtype == torch.float32 for p in batch.params)
    assert batch.positions.tolist() == list(range(24)) and batch.bad == []
    assert batch.labels.tolist() == source.labels[batch.ids.numpy()].tolist()
    for resolution, first, view in ((0, 0, VIEWS[1]), (1, 2, VIEWS[4])):
        v = view.number - first
        for b in (0, 23):
            index = int(batch.ids[b])
            params = sample_params(view, 1, 0, index, 28, 28)
            assert ViewParams.unpack(batch.params[resolution][v, b].numpy()) == params
            assert (batch.crops[resolution][v, b].numpy() == crop(source.read(index), params, view.size)).all()


@pytest.mark.parametrize("workers", [2, 4])
def test_any_number_of_workers(source, workers):
    alone = steps(source, 0, 5, accumulate=2)
    for a, b in zip(alone, steps(source, 0, 5, accumulate=2, workers=workers), strict=True):
        assert len(a) == len(b) == 2
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start", [1, 82, 83, 84])
def test_from_any_step(source, workers, start):
    """2000 images in batches of 24: step 83 holds the end of one epoch and the start of the next."""
    whole = steps(source, 0, 86) if start > 80 else steps(source, 0, 4)
    end = len(whole)
    for a, b in zip(whole[start:], steps(source, start, end, workers=workers), strict=True):
        assert_equal(a[0], b[0])


def test_nothing_is_dropped_or_repeated_in_an_epoch(source):
    one_view = multicrop(ViewsConfig(**{"global": Crops(count=1, size=4)}))[:1]
    ids = torch.cat([b.ids for [b] in steps(source, 0, 84, views=one_view)])
    assert sorted(ids[:2000].tolist()) == list(range(2000))
    assert len(set(ids[2000:].tolist())) == 16


@pytest.mark.parametrize("world, accumulate", [(2, 1), (1, 3), (2, 2), (4, 3)])
def test_parts_are_the_whole_bit_for_bit(source, world, accumulate):
    for step in (0, 83):
        [[whole]] = steps(source, step, step + 1)
        options = {"world": world, "accumulate": accumulate}
        parts = [b for rank in range(world) for b in steps(source, step, step + 1, rank=rank, **options)[0]]
        assert len(parts) == world * accumulate
        assert_equal(whole, joined(parts))


def test_seeds_and_epochs_differ(source):
    [[a]], [[b]] = steps(source, 0, 1), steps(source, 0, 1, seed=2)
    assert not torch.equal(a.ids, b.ids)
    small = sources_subset(source, 24)
    [first], [second] = steps(small, 0, 2)
    assert sorted(first.ids.tolist()) == sorted(second.ids.tolist()) and not torch.equal(first.ids, second.ids)
    again = {int(i): p for i, p in zip(second.ids, second.params[0][0])}
    assert all(not torch.equal(p, again[int(i)]) for i, p in zip(first.ids, first.params[0][0]))


def sources_subset(source, count):
    from selfsup.data.sources import Subset

    return Subset(source, range(count))


def test_global_random_numbers_and_threads_are_left_alone(source):
    torch.manual_seed(5)
    np.random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), torch.get_num_threads()
    torch.set_num_threads(2)
    seen = []

    class Asking(Source):
        labels = None

        def __len__(self):
            return 24

        def read(self, i):
            seen.append(torch.get_num_threads())
            return source.read(i)

        def name(self, i):
            return str(i)

        def fingerprint(self):
            return ""

    steps(Asking(1, source.config), 0, 2)
    assert set(seen) == {1} and torch.get_num_threads() == 2
    steps(source, 0, 2, workers=2)
    torch.set_num_threads(before[2])
    assert torch.equal(torch.get_rng_state(), before[0]) and (np.random.get_state()[1] == before[1]).all()


def test_photographs_of_many_sizes_and_channels(flat_folder):
    views = multicrop(ViewsConfig(**{"global": Crops(size=32), "local": Crops(count=2, size=16)}))
    for channels in (1, 3, 4):
        [[batch]] = steps(open_source(str(flat_folder), channels=channels), 0, 1, views=views)
        assert batch.crops[0].shape == (2, 24, channels, 32, 32) and batch.labels.tolist() == [-1] * 24
    many = wrap_dataset(torch.utils.data.TensorDataset(torch.rand(30, 13, 20, 24)), channels=13)
    for batch in (steps(many, 0, 1, views=views)[0][0], steps(many, 0, 1, views=views, workers=2)[0][0]):
        assert batch.crops[1].shape == (2, 24, 13, 16, 16)


def test_cropping_in_chunks_changes_nothing(flat_folder, monkeypatch):
    from selfsup.data import batch as module

    source = open_source(str(flat_folder), channels=3)
    [[whole]] = steps(source, 0, 1)
    monkeypatch.setattr(module, "_PIXELS_AT_ONCE", 12_000)  # two or three images
    monkeypatch.setattr(module, "_KEEP", 0)
    [[pieces]] = steps(source, 0, 1)
    assert_equal(whole, pieces)


def test_too_few_images(source):
    with pytest.raises(UserError, match=r"data holds 7 images, fewer than global_batch=64.*7 or less"):
        Loader(sources_subset(source, 7), VIEWS, seed=0, global_batch=64)
    with pytest.raises(UserError, match="does not split"):
        Loader(source, VIEWS, seed=0, global_batch=64, world=3)


# ---------------------------------------------------------------------------------------------------------- bad images


@pytest.fixture
def spoiled(tmp_path, pictures):
    """30 files, three of them broken, two of these neighbours."""
    for i, picture in enumerate(pictures[:30]):
        Image.fromarray(picture).save(tmp_path / f"{i:02d}.jpg")
    (tmp_path / "04.jpg").write_bytes(b"")
    (tmp_path / "05.jpg").write_text("<html>not found</html>")
    whole = (tmp_path / "29.jpg").read_bytes()
    (tmp_path / "29.jpg").write_bytes(whole[: len(whole) // 2])
    return tmp_path


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_replaced_and_named(spoiled, workers):
    source = open_source(str(spoiled), channels=3)
    [[batch]] = steps(source, 0, 1, global_batch=30, workers=workers)
    assert sorted(batch.ids.tolist()) == list(range(30))
    found = {os.path.basename(name): reason for name, reason in batch.bad}
    assert found.keys() == {"04.jpg", "05.jpg", "29.jpg"}
    assert "0 bytes" in found["04.jpg"] and "HTML" in found["05.jpg"] and "truncated" in found["29.jpg"]
    place = {int(i): b for b, i in enumerate(batch.ids)}
    for asked, given in ((4, 6), (5, 6), (29, 0)):  # the next that can be read
        params = ViewParams.unpack(batch.params[0][0, place[asked]].numpy())
        assert params == sample_params(VIEWS[0], 1, 0, asked, 64, 80)
        assert (batch.crops[0][0, place[asked]].numpy() == crop(source.read(given), params, 28)).all()


def test_nothing_readable_stops(tmp_path):
    for i in range(20):
        (tmp_path / f"{i}.jpg").write_bytes(b"")
    source = open_source(str(tmp_path), channels=3)
    for workers in (0, 2):
        with pytest.raises(UserError, match=r"20 images in a row cannot be read; the last is .*0 bytes"):
            steps(source, 0, 1, global_batch=10, workers=workers)


def test_a_label_goes_with_the_image_that_is_seen(source):
    class Hole(Source):
        labels = np.arange(24) % 10

        def __len__(self):
            return 24

        def read(self, i):
            if i == 3:
                raise BadImage("a hole")
            return source.read(i)

        def name(self, i):
            return f"item {i}"

        def fingerprint(self):
            return ""

    [[batch]] = steps(Hole(1, source.config), 0, 1)
    assert batch.labels[(batch.ids == 3).nonzero()[0, 0]] == 4 and batch.bad == [("item 3", "a hole")]


def test_copies(source):
    """Repeated augmentation: three in a row of each image, across batches, all different; every image once in three epochs."""
    subset = sources_subset(source, 50)
    batches = [batch for (batch,) in steps(subset, 0, 25, copies=3, global_batch=24)]  # 600 = 4 x 50 x 3
    ids, draws = (torch.cat([getattr(b, name) for b in batches]).view(-1, 3) for name in ("ids", "draws"))
    assert torch.equal(ids, ids[:, :1].expand(-1, 3))
    plain = torch.cat([b.ids for (b,) in steps(subset, 0, 20, global_batch=10)])
    assert torch.equal(ids[:, 0], plain)  # the order of images without copies
    assert torch.equal(draws, (torch.arange(200) // 50 * 3)[:, None] + torch.arange(3))
    params = torch.cat([b.params[0][0] for b in batches]).view(200, 3, -1)
    assert all((params[:, i] != params[:, j]).any(1).float().mean() > 0.98 for i, j in ((0, 1), (0, 2), (1, 2)))


def test_copies_do_not_depend_on_who_makes_them(source):
    """Ranks, micro-batches, workers, and where a run begins again."""
    whole = [batch for (batch,) in steps(source, 0, 4, copies=3)]
    resumed = [batch for (batch,) in steps(source, 2, 4, copies=3, workers=2)]
    for a, b in zip(whole[2:], resumed, strict=True):
        assert_equal(a, b)
    parts = [steps(source, 1, 2, copies=3, accumulate=2, rank=rank, world=2)[0] for rank in range(2)]
    assert_equal(joined([batch for rank in parts for batch in rank]), whole[1])


# ------------------------------------------------------------------------------------------------------------ workers


class Telling(torch.utils.data.Dataset):
    """Images that say in which process they were made."""

    def __init__(self, folder, action=None):
        self.folder, self.action = folder, action

    def __len__(self):
        return 64

    def __getitem__(self, i):
        if torch.utils.data.get_worker_info() is not None:
            (self.folder / str(os.getpid())).touch()
            if self.action == "raise":
                raise KeyError("a defect of the data set")
        return Image.new("L", (28, 28), i)


def test_a_defect_in_a_worker_shows_its_traceback(tmp_path):
    with pytest.raises(RuntimeError, match=r"(?s)KeyError.*a defect of the data set.*__getitem__"):
        steps(wrap_dataset(Telling(tmp_path, "raise"), channels=1), 0, 3, workers=2)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_ignore_a_schedulers_signals_and_end_with_the_stream(tmp_path):
    stream = Loader(wrap_dataset(Telling(tmp_path), channels=1), VIEWS, seed=0, global_batch=8, workers=2).stream(
        0, 200
    )
    first = next(stream)
    assert first and eventually(lambda: len(list(tmp_path.iterdir())) == 2)  # one may be slow to start
    pids = [int(p.name) for p in tmp_path.iterdir()]
    assert os.getpid() not in pids
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT)
    mask = sum(1 << (number - 1) for number in numbers)
    for pid in pids:
        # the C library blocks all signals for a moment whenever it starts a thread, such as the one that fills a queue
        assert eventually(lambda pid=pid: signal_set(pid, "SigBlk") & mask == 0)
        assert signal_set(pid, "SigIgn") & mask == mask
        for number in numbers:
            os.kill(pid, number)
    assert len(list(stream)) == 199  # they went on
    stream = Loader(wrap_dataset(Telling(tmp_path), channels=1), VIEWS, seed=0, global_batch=8, workers=2).stream(
        0, 200
    )
    next(stream)
    stream.close()  # stopped early
    assert not any(alive(int(p.name)) for p in tmp_path.iterdir())


def signal_set(pid, name):
    """A set of signals in /proc/PID/status, as an integer."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split(":")[1], 16) for line in lines if line.startswith(f"{name}:"))


def eventually(condition):
    """Whether it holds within 30 seconds; looked at often."""
    for _ in range(3000):
        if condition():
            return True
        time.sleep(0.01)
    return False


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] != "Z"
    except OSError:
        return False


def test_the_trainers_handlers_still_work():
    """Signals held while workers start reach the trainer afterwards; its handlers and mask are as before."""
    script = textwrap.dedent("""
        import os, signal
        from selfsup.config import ViewsConfig, Crops
        from selfsup.data.loader import Loader
        from selfsup.data.sources import open_source
        from selfsup.data.views import multicrop
        got = []
        signal.signal(signal.SIGUSR1, lambda *a: got.append(1))
        views = multicrop(ViewsConfig(**{"global": Crops(size=8), "local": Crops(count=0)}))
        stream = Loader(open_source("demo:val", channels=1), views, seed=0, global_batch=8, workers=2).stream(0, 5)
        next(stream)
        os.kill(0, signal.SIGUSR1)  # the whole process group, as srun does
        assert len(list(stream)) == 4 and got == [1] and not signal.pthread_sigmask(signal.SIG_BLOCK, []), got
    """)
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, start_new_session=True, timeout=100
    )
    assert result.returncode == 0, result.stderr


def test_waiting_is_measured(tmp_path):
    class Slow(Telling):
        def __getitem__(self, i):
            time.sleep(0.005)
            return super().__getitem__(i)

    loader = Loader(wrap_dataset(Slow(tmp_path), channels=1), VIEWS, seed=0, global_batch=8)
    for _ in loader.stream(0, 3):
        time.sleep(0.05)  # the consumer's own time does not count
    assert 0.12 <= loader.wait_seconds < 0.12 + 3 * 0.05 + 1.0
