"""Submitted runs without Slurm, in real processes: in the background and here, killed, told to stop, started again."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from selfsup.config import dump, read_recipe
from selfsup.errors import UserError
from selfsup.guard.processes import Process
from selfsup.launch import history, local, local_ranks, submission
from selfsup.launch.cancel import cancel
from selfsup.launch.cluster import Cluster
from tests.faults.lab import log, weights
from tests.methods.tiny import cli, tiny_config, write_images

STEPS = 150
RANKS = ("--cluster", "local", "tasks_per_node=2", "env.OMP_NUM_THREADS=1", "requeue.delay_s=0")
METHODS = """
import os, time
from selfsup.methods.dino import DINO

class Slow(DINO):
    def forward(self, views, s):
        time.sleep(float(os.environ.get("SLOW", "0")))
        return super().forward(views, s)

class Broken(DINO):
    def forward(self, views, s):
        raise OSError("broken")
"""
SLOW = {"SLOW": "0.1"}
"""Of a run that is to be disturbed: it must not be over before that, however busy the machine is."""


def until(condition: Callable[[], Any], otherwise: Callable[[], str] | str, timeout: float = 120) -> Any:
    """What it returned once it was true."""
    end = time.monotonic() + timeout
    while not (found := condition()):
        assert time.monotonic() < end, otherwise if isinstance(otherwise, str) else otherwise()
        time.sleep(0.05)
    return found


class Run:
    """A submitted run."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def events(self, *kinds: str, task: str = "train") -> list[dict[str, Any]]:
        """Of its history."""
        return [e for e in history.read(self.out) if e["event"] in kinds and e["task"] == task]

    def reasons(self) -> list[str]:
        """Why it was started again."""
        return [e["reason"] for e in self.events("requeue")]

    def step(self) -> int:
        """Lines of its log."""
        with contextlib.suppress(OSError):
            return (self.out / "metrics.jsonl").read_bytes().count(b"\n")
        return 0

    def starts(self, count: int) -> None:
        """Until it has started so often, and has trained on."""
        self.until(lambda: len(self.events("start")) >= count)
        before = self.events("start")[count - 1]["step"]
        self.until(lambda: self.step() > before + 10)

    def until(self, condition: Callable[[], Any]) -> None:
        """Until it is true, or nobody can make it so any more."""
        until(
            lambda: condition() or (local.supervisor_alive(self.out) is False and (self.out / local.FILE).exists()),
            self.told,
        )
        assert condition(), self.told()

    def ends(self) -> None:
        """Until nobody supervises it any more."""
        until(lambda: not local.supervisor_alive(self.out), self.told, 240)

    def supervisor(self) -> int:
        """Its process id."""
        return int(json.loads((self.out / local.FILE).read_bytes())["pid"])

    def ranks(self) -> list[int]:
        """Those of the start there is."""
        return [int(json.loads(f.read_bytes())["pid"]) for f in sorted((self.out / "ranks").glob("rank_*.json"))]

    def told(self) -> str:
        """All that is known of it."""
        texts = [f"--- {path.name}\n{path.read_text()[-2500:]}" for path in sorted(self.out.glob("logs/*.out"))]
        return "\n".join([*map(str, history.read(self.out)), *texts])

    def same_as(self, other: Path) -> None:
        """Every step once, the same figures and weights."""
        ours, theirs = log(self.out), log(other)
        assert len(ours) == len(theirs) == STEPS
        assert [(a["step"], a, b) for a, b in zip(ours, theirs) if a != b][:1] == []
        mine, others = weights(self.out, STEPS), weights(other, STEPS)
        assert mine.keys() == others.keys() and [k for k in mine if mine[k] != others[k]] == []
        assert not (self.out / "lease.json").exists()


class Runs:
    """Submits runs of one recipe, with loader workers, from a folder whose name is no easy one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "größer & (1)"
        self.folder.mkdir()
        self.plain = folder
        self.images = write_images(self.folder / "Bilder", 24, classes=3)
        self.recipe = self.folder / "r.yaml"
        settings = ("precision=fp32", f"steps={STEPS}", "log_every=5", "checkpoint.every=20", "workers=1")
        text = dump(tiny_config("dino", f"data={self.images}", *settings, f"eval.train={self.images}"))
        assert "name: dino" in text
        self.recipe.write_text(text.replace("name: dino", "name: langsam:Slow"))
        (self.plain / "langsam.py").write_text(METHODS)
        self.started: list[Path] = []

    def submit(self, name: str, *words: str, status: int = 0, env: dict[str, str] | None = None) -> Run:
        """`selfsup submit`."""
        run = Run(self.folder / name)
        self.started.append(run.out)
        env = {"PYTHONPATH": str(self.plain), **(env or {})}
        done = cli("submit", str(self.recipe), *RANKS, "--out", str(run.out), *words, env=env)
        assert done.returncode == status, f"{done.stdout}{done.stderr}\n{run.told()}"
        return run

    def end(self) -> None:
        """Kill what is left."""
        for out in self.started:
            for _ in range(3):
                if local.supervisor_alive(out):
                    local.stop(out)
                    time.sleep(0.2)
            until(lambda out=out: not local.supervisor_alive(out), f"{out}: its supervisor does not end")


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """What still runs at the end is killed."""
    made = Runs(tmp_path_factory.mktemp("local"))
    yield made
    made.end()


@pytest.fixture(scope="session")
def undisturbed(runs: Runs) -> Path:
    """A run of two ranks that nothing happened to, and its evaluations."""
    run = runs.submit("undisturbed", "--then", "knn,linear")
    run.ends()
    return run.out


def test_submit_and_finish(runs: Runs, undisturbed: Path):
    run = Run(undisturbed)
    (start,), (end,) = run.events("start"), run.events("end")
    assert (start["world"], start["step"], end["code"], end["step"]) == (2, 0, 0, STEPS), run.told()
    assert run.reasons() == [] and run.events("stop") == []
    for task in ("knn", "linear"):
        assert (undisturbed / "eval" / f"{task}.json").exists(), run.told()
        assert [e["code"] for e in run.events("end", task=task)] == [0]
    told = submission.read(undisturbed)
    assert told is not None and told.job is not None
    names = {path.name for path in (undisturbed / "logs").iterdir()}
    assert {f"{told.job}_{end}log.out" for end in ("", "0_", "1_")} <= names
    outcome = json.loads((undisturbed / "job/outcome.json").read_text())
    assert outcome == {"job": told.job, "restart": 0, "task": "train", "code": 0, "why": "", "step": STEPS}
    (found,) = json.loads(cli("status", str(undisturbed), "--json").stdout)
    assert (found["state"], found["step"], found["restarts"]) == ("completed", STEPS, 0)


def test_a_killed_rank_and_a_request_to_save(runs: Runs, undisturbed: Path):
    """kill -9 of a rank ends the other, and all starts again; so does USR2 to the supervisor, after a save."""
    run = runs.submit("disturbed", env=SLOW)
    run.starts(1)
    os.kill(run.ranks()[1], signal.SIGKILL)
    run.starts(2)
    assert run.reasons() == ["crash"] and run.events("requeue")[0]["crashes"] == 1
    os.kill(run.supervisor(), signal.SIGUSR2)
    run.starts(3)
    assert run.reasons() == ["crash", "stopped"]
    saved = run.events("end")[-1]
    assert (saved["code"], saved["step"]) == (75, run.events("start")[-1]["step"])
    run.ends()
    assert run.events("end")[-1]["code"] == 0, run.told()
    run.same_as(undisturbed)


def test_cancelled_and_gone_on_with(runs: Runs, undisturbed: Path):
    """By `selfsup cancel`; and what becomes of ranks whose supervisor is killed: they save and end."""
    run = runs.submit("cancelled", "--then", "knn", env=SLOW)
    run.starts(1)
    cancel(run.out)
    run.ends()
    assert run.reasons() == [] and [e["reason"] for e in run.events("stop")] == ["cancelled"]
    assert run.events("end")[-1]["code"] == 75, run.told()
    assert not (run.out / "eval").exists()

    runs.submit("cancelled", "--resume", env=SLOW)
    run.starts(2)
    assert run.events("start")[1]["step"] == run.events("end")[0]["step"] > 0
    with pytest.raises(UserError, match="is supervised by process"):
        local.supervise(run.out)
    ranks = [Process(**{**vars(Process.current()), "pid": pid, "started": None}) for pid in run.ranks()]
    os.kill(run.supervisor(), signal.SIGKILL)
    until(lambda: len(run.events("end")) == 2, run.told)
    until(lambda: all(rank.alive() is False for rank in ranks), "ranks live on")
    assert not local.supervisor_alive(run.out)
    local.stop(run.out)  # nobody is there: nothing happens

    runs.submit("cancelled", "--resume")
    run.starts(3)
    run.ends()
    run.same_as(undisturbed)


def test_what_is_not_started_again(runs: Runs):
    """The user's errors; what crashes without progress, after so many times; what has reached its stop_at."""
    empty = runs.folder / "leer"
    empty.mkdir()
    wrong = runs.submit("wrong", f"data={empty}", "--then", "knn")
    options = [f"method.{k}={v}" for k, v in read_recipe(str(runs.recipe))["method"].items() if k != "name"]
    crashing = runs.submit("crashing", "method=langsam:Broken", *options, "requeue.crashes=1", "tasks_per_node=1")
    stopping = runs.submit("stopping", "stop_at=20")
    for run in (wrong, crashing, stopping):
        run.ends()
    assert wrong.reasons() == [] and [e["reason"] for e in wrong.events("stop")] == ["user error"], wrong.told()
    assert not (wrong.out / "eval").exists()
    assert crashing.reasons() == ["crash"] and crashing.events("stop")[0]["reason"] == "crashes used up", (
        crashing.told()
    )
    assert stopping.reasons() == [] and stopping.events("stop")[0]["reason"] == "stop_at", stopping.told()


def test_time_limit(runs: Runs, undisturbed: Path):
    """A job of a minute that is told 30 s before its end goes on in the next one; setup and container lines are used."""
    mark = runs.folder / "setup"
    cluster = (
        "time=1",
        "signal_before_s=30",
        "env.A=a b",
        f'setup="echo $A >> {str(mark)!r}"',
        "container=env SLOW=0.25",
    )
    run = runs.submit("limited", *cluster)
    run.ends()
    assert set(run.reasons()) == {"time limit"}, run.told()
    run.same_as(undisturbed)
    assert mark.read_text() == "a b\n" * (len(run.reasons()) + 1), "once a start, not once a rank"


def test_a_sweep(runs: Runs):
    """One run of it is cancelled, the others go on, and the table has all."""
    sweep = runs.submit("sweep", "--sweep", "seed=0,1,2", "tasks_per_node=1", "array_parallelism=2")
    told = submission.read(sweep.out)
    assert told is not None and len(told.runs) == 3
    members = [Run(sweep.out / name) for name in told.runs]
    assert local.supervisor_alive(members[2].out), "it waits for its turn"
    for run in (members[0], members[2]):
        local.stop(run.out)
    sweep.ends()
    ends = [[e["reason"] for e in run.events("stop")] for run in members]
    assert ends == [["cancelled"], [], ["cancelled"]], "\n".join(run.told() for run in members)
    assert members[2].events("start") == [] and members[1].events("end")[-1]["code"] == 0
    assert len(json.loads((sweep.out / "sweep.json").read_text())) == 3


def test_in_the_foreground(runs: Runs):
    """Rank 0 is seen on the terminal. Ctrl-C saves and ends; the next time it is finished."""
    out = runs.folder / "debug"
    words = [
        "submit",
        str(runs.recipe),
        "--cluster",
        "debug",
        "tasks_per_node=2",
        "env.OMP_NUM_THREADS=1",
        "--out",
        str(out),
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "selfsup.cli", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, **SLOW, "PYTHONPATH": str(runs.plain)},
    )
    run = Run(out)
    run.starts(1)
    os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=90)
    assert process.returncode == 75 and "step 5/" in said and "--resume" in said, said
    assert [e["code"] for e in run.events("end")] == [75]
    done = cli(*words, "--resume", env={"PYTHONPATH": str(runs.plain)})
    assert done.returncode == 0 and f"step {STEPS}/{STEPS}" in done.stdout, done.stdout + done.stderr


# --------------------------------------------------------------------------------------------------------------- ranks


class Shell:
    """local_ranks.py with two ranks of a line of shell."""

    def __init__(self, folder: Path, line: str, count: int = 2) -> None:
        self.folder, self.count = folder, count
        options = ["--count", str(count), "--logs", str(folder / "x y"), "--parent", str(os.getpid())]
        command = [sys.executable, "-I", str(local_ranks.__file__), *options, line]
        self.process = subprocess.Popen(command)

    def texts(self) -> list[str]:
        """Of the logs."""
        files = [self.folder / f"x y_{rank}_log.out" for rank in range(self.count)]
        return [file.read_text() if file.exists() else "" for file in files]

    def up(self) -> None:
        """Each has said something."""
        until(lambda: all(self.texts()), "they say nothing", 30)


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("true", 0),
        ("sh -c 'exit $RANK'", 1),
        ("sh -c 'exit 75'", 75),
        ("sh -c '[ $RANK = 0 ] || kill -9 $$; exec sleep 600'", 137),
        ("sh -c '[ $RANK = 0 ] || exit 2; trap \"exit 75\" TERM; sleep 600 & wait'", 2),
        ("/nowhere/at/all", 127),
    ],
)
def test_the_code_is_that_of_the_first_that_failed(line: str, code: int, tmp_path: Path):
    """And with one that fails the others end."""
    assert Shell(tmp_path, line).process.wait(60) == code


def test_places_and_logs(tmp_path: Path):
    names = "$RANK $WORLD_SIZE $LOCAL_RANK $LOCAL_WORLD_SIZE $GROUP_RANK"
    for _ in range(2):
        assert Shell(tmp_path, f"echo {names}").process.wait(60) == 0
    assert Shell(tmp_path, "true").texts() == ["0 2 0 2 0\n" * 2, "1 2 1 2 0\n" * 2], "logs go on"


TRAPS = "sh -c 'for s in USR1 USR2 TERM; do trap \"echo $s\" $s; done; sleep 600 & echo up; while :; do wait; sleep 0.1; done'"


def test_signals_reach_every_rank_and_a_kill_their_children(tmp_path: Path):
    shell = Shell(tmp_path, TRAPS)
    shell.up()
    for number, name in ((signal.SIGUSR2, "USR2"), (signal.SIGUSR1, "USR1"), (signal.SIGINT, "TERM")):
        shell.process.send_signal(number)
        until(lambda name=name: all(name in text for text in shell.texts()), f"no {name}", 30)
    shell.process.send_signal(signal.SIGQUIT)
    assert shell.process.wait(30) == 137
    until(lambda: not _sleepers(tmp_path), "children live on", 30)


def _sleepers(folder: Path) -> list[int]:
    """Processes that write into this folder."""
    found = []
    for link in Path("/proc").glob("[0-9]*/fd/1"):
        with contextlib.suppress(OSError):
            if os.readlink(link).startswith(str(folder)):
                found.append(int(link.parts[2]))
    return found


def test_ranks_end_with_their_parent(tmp_path: Path):
    options = ["--count", "2", "--logs", str(tmp_path / "x"), "--parent", "1"]
    line = "sh -c 'trap \"exit 75\" TERM; echo up; sleep 600 & wait'"
    command = [sys.executable, "-I", str(local_ranks.__file__), *options, line]
    assert subprocess.run(command, timeout=60).returncode in (75, 143)
    until(lambda: not _sleepers(tmp_path), "children live on", 30)


def test_a_supervisor_that_does_not_start(tmp_path: Path):
    """Its own words, in two lines."""
    told = submission.Submission(
        kind="local", job="local-1", cluster=Cluster(kind="local"), cluster_name="local", recipe="r", submitted="",
        selfsup="0", code_sha256="0", cwd=str(tmp_path),
    )  # fmt: skip
    submission.write(tmp_path, told)
    (tmp_path / "code" / "selfsup").mkdir(parents=True)
    (tmp_path / "code" / "selfsup" / "__init__.py").write_text("raise SystemExit('no')")
    with pytest.raises(UserError, match=r"does not start: no\nIts log: .*local-1_log.out"):
        local.start(tmp_path, told, foreground=False)
    submission.write(tmp_path, told.model_copy(update={"cwd": str(tmp_path / "gone")}))
    with pytest.raises(UserError, match="gone: cannot start in the background: No such file"):
        local.start(tmp_path, told.model_copy(update={"cwd": str(tmp_path / "gone")}), foreground=False)
    assert local.supervisor_alive(tmp_path) is False
