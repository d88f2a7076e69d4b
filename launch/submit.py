"""`selfsup submit`: everything is checked, then written into the run folder, then handed to Slurm or to this machine.

If Slurm refuses the training, all that was written is taken back. The evaluations and the table come after it, as jobs
of their own; if one of them is refused, that is said, and the training stays.
"""

import contextlib
import datetime
import fcntl
import importlib.metadata
import io
import os
import secrets
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from selfsup import config as configuration
from selfsup import durable
from selfsup.config import Config
from selfsup.errors import UserError

from . import commands, snapshot, submission
from .plan import Check, CheckEvaluation, Member, Plan, check_free, make
from .script import Sbatch
from .submission import Submission, Then

_LATER = "JOB"
"""Stands for a number that is not known yet, in what --dry-run shows of dependents."""


def _as_it_is(config: Config) -> Config:
    return config


def submit(
    recipe: str,
    overrides: list[str],
    *,
    cluster: str,
    out: Path | None = None,
    then: Sequence[str] = (),
    sweep: Sequence[str] = (),
    resume: bool = False,
    dry_run: bool = False,
    check: Check = _as_it_is,
    tasks: Sequence[str] = (),
    check_evaluation: CheckEvaluation = lambda task, overrides: None,
) -> None:
    """Train as a job, or as an array of them, and evaluate afterwards; prints what it did. Raises UserError.

    overrides: of the recipe and the cluster, in any order. then, sweep: as typed, each may hold several.
    check: of the method's options; tasks and check_evaluation: the evaluations there are, and of their keys.
    """
    plan = make(
        recipe,
        overrides,
        cluster=cluster,
        out=out,
        then=then,
        sweeps=sweep,
        resume=resume,
        check=check,
        tasks=tasks,
        check_evaluation=check_evaluation,
    )
    notes = check_free(plan, resume)
    _say(*plan.notes, *notes)
    if dry_run:
        _show(plan)
    else:
        _submit(plan, resume)


def _say(*lines: str) -> None:
    for line in lines:
        _tell(line, sys.stderr)


def _tell(line: str, stream: TextIO | None = None) -> None:
    """By default on stdout. That nobody reads it, as behind `| head -1`, does not stop what follows a job."""
    with contextlib.suppress(OSError):
        print(line, file=stream, flush=True)


# ------------------------------------------------------------------------------------------------------------- jobs


def training(plan: Plan) -> Sbatch:
    """The job that trains, of a sweep the array."""
    command = commands.training(plan.out, plan.cluster, plan.code)
    after = commands.afterwards(plan.out, plan.cluster, plan.code, "train")
    return Sbatch(plan.cluster, plan.logs, command, name=plan.out.absolute().name, after=after)


def evaluation(plan: Plan, then: Then, job: str) -> Sbatch:
    """What follows the job, of a sweep an array whose jobs follow one of its jobs each."""
    small = plan.cluster.for_evaluation()
    command = commands.evaluation(plan.out, small, plan.code, then.task, then.overrides)
    after = commands.afterwards(plan.out, small, plan.code, then.task)
    condition = f"{'aftercorr' if plan.sweep else 'afterok'}:{job}"
    name = f"{plan.out.absolute().name} {then.task}"
    return Sbatch(small, plan.logs, command, name=name, dependency=condition, after=after)


def table(plan: Plan, jobs: Sequence[str]) -> Sbatch:
    """The table of a sweep, however its runs ended."""
    small = plan.cluster.for_evaluation()
    command = commands.table(plan.out, small, plan.code)
    condition = f"afterany:{':'.join(jobs)}"
    return Sbatch(small, plan.logs, command, name=f"{plan.out.absolute().name} table", dependency=condition)


# ---------------------------------------------------------------------------------------------------------- writing


def _submit(plan: Plan, resume: bool) -> None:
    with contextlib.ExitStack() as undo:
        _make_folder(plan.out, undo)
        with _alone(plan.out):
            check_free(plan, resume)  # again: somebody may have been quicker
            told = _write(plan, undo)
            if plan.cluster.kind == "slurm":
                job = _hand_over(training(plan), plan.count)
                _taken(plan, undo)
                _report(plan, job)
                told = told.model_copy(update={"job": job})
                _write_numbers(plan, told)
                _launch_dependents(plan, told, job)
                _say_next(plan)
                return
        _start_here(plan, told, undo)


def _start_here(plan: Plan, told: Submission, undo: contextlib.ExitStack) -> None:
    from . import local

    told = told.model_copy(update={"job": f"local-{secrets.token_hex(4)}"})
    _write_numbers(plan, told)
    if plan.cluster.kind == "debug":
        _taken(plan, undo)  # it trains in there
        local.start(plan.out, told, foreground=True)
        return
    local.start(plan.out, told, foreground=False)
    _taken(plan, undo)
    _report(plan, str(told.job))
    _say_next(plan)


def _taken(plan: Plan, undo: contextlib.ExitStack) -> None:
    """From here on what was written stays."""
    undo.pop_all()
    shutil.rmtree(_aside(plan), ignore_errors=True)


def _hand_over(job: Sbatch, count: int | None) -> str:
    """Its number. Slurm's words, if it refuses, are in the error, and submitit would print them as well."""
    with contextlib.redirect_stderr(io.StringIO()):
        return job.launch(count)


def _launch_dependents(plan: Plan, told: Submission, job: str) -> None:
    numbers = [job]
    for at, each in enumerate(plan.then):
        number = _launch(evaluation(plan, each, job), plan.count, f"the evaluation {each.task}")
        numbers += [number] if number else []
        then = (*told.then[:at], each.model_copy(update={"job": number}), *told.then[at + 1 :])
        told = told.model_copy(update={"then": then})
        submission.write(plan.out, told)
    if plan.sweep:
        told = told.model_copy(update={"table": _launch(table(plan, numbers), None, "the table of the sweep")})
    if plan.then or plan.sweep:
        _write_numbers(plan, told)


def _launch(job: Sbatch, count: int | None, what: str) -> str | None:
    try:
        number = _hand_over(job, count)
    except UserError as error:
        _say(f"{what} will not follow, and the training goes on without it: {error}")
        return None
    _tell(f"job {number}: {what}, {job.parameters['dependency']}")
    return number


def _write(plan: Plan, undo: contextlib.ExitStack) -> Submission:
    """The snapshot, the configurations and the submission, without a number."""
    for folder in (plan.out / "job", plan.logs, *(run for run in plan.runs() if run != plan.out)):
        _make_folder(folder, undo)
    if plan.code.exists():
        aside = _aside(plan)
        durable.rename(plan.code, aside)
        undo.callback(durable.rename, aside, plan.code)
    undo.callback(shutil.rmtree, plan.code, ignore_errors=True)
    digest = snapshot.take(plan.out, plan.members[0].config)
    told = Submission(
        kind=plan.cluster.kind,
        slurm_conf=os.environ.get("SLURM_CONF"),
        cluster=plan.cluster,
        cluster_name=plan.cluster_name,
        recipe=plan.recipe,
        overrides=plan.overrides,
        runs=tuple(member.folder for member in plan.members),
        sweep=plan.sweep,
        then=plan.then,
        submitted=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        selfsup=_version(),
        code_sha256=digest,
        cwd=os.getcwd(),
    )
    for member, run in zip(plan.members, plan.runs()):
        _make_folder(run / "job", undo)
        _keep(run / submission.CONFIG, undo)
        try:
            durable.write_atomically(run / submission.CONFIG, configuration.dump(member.config))
        except OSError as error:
            raise UserError(f"{run / submission.CONFIG}: cannot be written: {error.strerror or error}") from None
        _keep(submission.path(run), undo)
    _keep(submission.path(plan.out), undo)
    _write_numbers(plan, told)
    return told


def _write_numbers(plan: Plan, told: Submission) -> None:
    """What was submitted, and under which numbers, of a sweep also for each run."""
    if plan.sweep:
        for index, (member, run) in enumerate(zip(plan.members, plan.runs())):
            submission.write(run, _of_member(told, index, member))
    submission.write(plan.out, told)


def _of_member(told: Submission, index: int, member: Member) -> Submission:
    def own(job: str | None) -> str | None:
        return job and f"{job}_{index}"

    changes: dict[str, Any] = {
        "job": own(told.job),
        "overrides": (*told.overrides, *member.overrides),
        "runs": (".",),
        "sweep": {},
        "index": index,
        "part_of": "..",
        "code": f"../{told.code}",
        "logs": f"../{told.logs}",
        "table": None,
        "then": tuple(each.model_copy(update={"job": own(each.job)}) for each in told.then),
    }
    return told.model_copy(update=changes)


def _version() -> str:
    try:
        return importlib.metadata.version("selfsup")
    except importlib.metadata.PackageNotFoundError:  # a copy of the sources
        return "unknown"


# --------------------------------------------------------------------------------------------------- taking it back


def _make_folder(path: Path, undo: contextlib.ExitStack) -> None:
    """For its owner alone. What exists stays as it is."""
    try:
        for each in reversed([each for each in (path, *path.parents) if not each.exists()]):
            each.mkdir()
            if each == path:
                each.chmod(0o700)
                undo.callback(shutil.rmtree, each, ignore_errors=True)
            else:
                undo.callback(_remove_if_empty, each)
    except OSError as error:
        raise UserError(f"--out {path}: cannot be made: {error.strerror or error}; name another folder") from None


def _remove_if_empty(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.rmdir()


def _keep(path: Path, undo: contextlib.ExitStack) -> None:
    if path.exists():
        undo.callback(path.write_bytes, path.read_bytes())
    else:
        undo.callback(path.unlink, missing_ok=True)


def _aside(plan: Plan) -> Path:
    return plan.out / f"{durable.TEMPORARY}code-before-{os.getpid()}"


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Of two that submit to one folder on this machine, the second is refused. Where there are no locks, it is not."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--out {folder}: somebody is submitting to it at this moment") from None
        except OSError:
            pass
        yield
    finally:
        os.close(fd)


# --------------------------------------------------------------------------------------------------------- in words


def _report(plan: Plan, job: str) -> None:
    runs = f", {len(plan.members)} runs" if plan.sweep else ""
    _tell(f"job {job}: training{runs}, in {plan.out}")


def _say_next(plan: Plan) -> None:
    run, first = (shlex.quote(str(folder)) for folder in (plan.out, plan.runs()[0]))
    _tell(f"next: selfsup status {run}; selfsup logs {first} --follow; selfsup cancel {run}")


def _show(plan: Plan) -> None:
    """--dry-run: on stdout the script as it would be submitted (or the commands of ranks here), the rest on stderr."""
    cluster = plan.cluster
    _say(f"run folder: {plan.out.absolute()}", *(f"  run: {m.folder}" for m in plan.members if plan.sweep))
    if cluster.kind == "slurm":
        job = training(plan)
        unset = " ".join(job.not_inherited())
        _say("environment of the job: as it is here" + (f", without {unset}" if unset else ""))
    ranks, nodes = cluster.world_size, cluster.nodes
    _say(
        f"environment of each rank ({ranks} in all), besides that of the script: "
        f"PYTHONPATH={plan.code.absolute()} first; "
        f"WORLD_SIZE={ranks} RANK={_up_to(ranks)} LOCAL_WORLD_SIZE={cluster.tasks} LOCAL_RANK={_up_to(cluster.tasks)} "
        f"GROUP_RANK={_up_to(nodes)} MASTER_ADDR=(the first node) MASTER_PORT=(one of {cluster.ports or '20000-31999'}) "
        "SELFSUP_JOB=(its number) SELFSUP_RESTART=(how often it was started again)"
    )
    if cluster.kind != "slurm":
        print(commands.training(plan.out, cluster, plan.code), flush=True)
        for each in plan.then:
            print(
                commands.evaluation(plan.out, cluster.for_evaluation(), plan.code, each.task, each.overrides),
                flush=True,
            )
        if plan.sweep:
            print(commands.table(plan.out, cluster, plan.code), flush=True)
        return
    for each in plan.then:
        _say(f"--- then {each.task}:", evaluation(plan, each, _LATER).text(plan.count))
    if plan.sweep:
        _say("--- at the end:", table(plan, [_LATER] * (1 + len(plan.then))).text())
    if plan.then or plan.sweep:
        _say("--- the training:")
    sys.stdout.write(job.text(plan.count))
    sys.stdout.flush()


def _up_to(count: int) -> str:
    return f"0..{count - 1}" if count > 1 else "0"
