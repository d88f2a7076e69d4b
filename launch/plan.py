"""What is to be submitted, checked as far as it can be before anything is written or queued."""

import os
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfsup import config as configuration
from selfsup.config import Config
from selfsup.errors import UserError
from selfsup.guard.lease import holder
from selfsup.wording import one_line

from . import cluster as clusters
from . import script, slurm, submission, sweep
from .cluster import Cluster
from .submission import Submission, Then

Check = Callable[[Config], Config | None]
"""Checks the options of the method, which its own schema knows, and may fill them in."""
CheckEvaluation = Callable[[str, list[str]], None]


@dataclass(frozen=True)
class Member:
    """One run. folder: relative to the submission's."""

    folder: str
    overrides: tuple[str, ...]
    config: Config


@dataclass(frozen=True)
class Plan:
    """One submission. sweep: values by key; {} for a single run, whose folder is the submission's own, '.'."""

    recipe: str
    overrides: tuple[str, ...]
    cluster: Cluster
    cluster_name: str
    out: Path
    members: tuple[Member, ...]
    sweep: dict[str, list[Any]]
    then: tuple[Then, ...]
    notes: tuple[str, ...]

    @property
    def count(self) -> int | None:
        """Jobs of the array; None for a single run, which is none."""
        return len(self.members) if self.sweep else None

    @property
    def code(self) -> Path:
        """The snapshot of the program."""
        return self.out / "code"

    @property
    def logs(self) -> Path:
        """Scripts, and what jobs print."""
        return self.out / "logs"

    def runs(self) -> list[Path]:
        """The folders of all runs."""
        return [self.out / member.folder for member in self.members]


def make(
    recipe: str,
    overrides: Sequence[str],
    *,
    cluster: str,
    out: Path | None,
    then: Sequence[str],
    sweeps: Sequence[str],
    resume: bool,
    check: Check,
    tasks: Sequence[str],
    check_evaluation: CheckEvaluation,
) -> Plan:
    """Read everything, and refuse what could not run. Raises UserError."""
    ours, others = clusters.split_overrides(overrides)
    where = clusters.load(cluster, ours)
    notes: list[str] = []
    values: dict[str, list[Any]] = {}
    members = [Member(".", (), configuration.load(recipe, others))]
    if sweeps:
        found = sweep.expand(sweeps, recipe, others)
        values, notes = found.values, found.notes
        members = [Member(*each) for each in found.members]
    members = [_checked(member, where, check) for member in members]
    if out is None and resume:
        raise UserError("--resume needs --out RUN: the folder of the run to go on with")
    out = out or default_folder(recipe)
    if ".." in out.parts:
        out = out.resolve()  # jobs must find it even when the folder that it is relative to is gone
    following = evaluations(then, tasks, check_evaluation)
    if where.kind == "slurm":
        notes += _missing((member.config for member in members), following)
    plan = Plan(
        recipe,
        tuple(overrides),
        where,
        cluster,
        out,
        tuple(members),
        values,
        tuple(following),
        tuple(notes),
    )
    if where.kind == "slurm":
        script.check_folder(plan.logs)
    return plan


def default_folder(recipe: str) -> Path:
    """runs/RECIPE, or runs/RECIPE-2 and so on, if there is one."""
    name, n = Path(recipe).stem, 1
    folder = Path("runs") / name
    while os.path.lexists(folder):
        n += 1
        folder = Path("runs") / f"{name}-{n}"
    return folder


def evaluations(words: Iterable[str], tasks: Sequence[str], check: CheckEvaluation) -> list[Then]:
    """['knn,linear'] or ['knn k=10,20', 'linear']: what follows the training, each with its keys. Raises UserError."""
    found: list[Then] = []
    for word in words:
        try:
            parts = shlex.split(word)
        except ValueError as error:
            raise UserError(f"--then {one_line(word)!r}: {error}") from None
        if not parts or not all(parts):
            raise UserError(f"--then {one_line(word)!r}: name evaluations, as in knn,linear or 'knn k=10,20'")
        named = [(parts[0], parts[1:])] if len(parts) > 1 else [(task, []) for task in parts[0].split(",")]
        for task, settings in named:
            if task not in tasks:
                hint = configuration.suggest(task, tasks)
                known = (
                    f"known: {', '.join(tasks)}; one with keys of its own is a --then of its own, as in 'knn k=10,20'"
                )
                raise UserError(f"--then {one_line(word)!r}: no evaluation {one_line(task)!r}{hint}\n{known}")
            if task in [then.task for then in found]:
                raise UserError(f"--then {one_line(word)!r}: {task} is given twice, and would write one file twice")
            check(task, settings)
            found.append(Then(task=task, overrides=tuple(settings)))
    return found


def _checked(member: Member, cluster: Cluster, check: Check) -> Member:
    config, world = member.config, cluster.world_size
    run = "" if member.folder == "." else f"run {member.folder}: "
    if config.global_batch % (config.accumulate * world):
        ranks = f"{world} processes (nodes={cluster.nodes} x {cluster.tasks} tasks)"
        raise UserError(
            f"{run}global_batch={config.global_batch} is not divisible by accumulate={config.accumulate} x {ranks}; "
            f"use a multiple of {config.accumulate * world}"
        )
    before = [*sys.path]
    if ":" in config.method.name:
        sys.path.append(os.getcwd())  # where its module may be, as snapshot finds it
    try:
        return Member(member.folder, member.overrides, check(config) or config)
    except UserError as error:
        raise UserError(f"{run}{error}") from None
    finally:
        sys.path[:] = before


def _missing(configs: Iterable[Config], then: Iterable[Then]) -> list[str]:
    """Data that is not on this machine: nodes may have other disks, so that is only said."""
    named: list[tuple[str, str | None]] = []
    for config in configs:
        data, evaluation = config.data, config.eval
        named += [("data.path", data.path), ("data.val", data.val)]
        named += [("eval.train", evaluation.train), ("eval.val", evaluation.val)]
    for each in then:
        for key, _, given in (word.partition("=") for word in each.overrides):
            if key in ("data", "data.path", "data.val", "eval.train", "eval.val"):
                named.append((f"{each.task} {key}", given))
    found = []
    for key, value in named:
        if value and value != "demo" and ":" not in value.split("/")[0] and not os.path.exists(value):
            found.append(f"{key}={value}: not on this machine; the jobs must find it, from {os.getcwd()}")
    return list(dict.fromkeys(found))


def check_free(plan: Plan, resume: bool) -> list[str]:
    """Whether the folder may be used; announcements of what changes in a run that goes on. Raises UserError."""
    out = plan.out
    if os.path.lexists(out) and not out.is_dir():
        raise UserError(f"--out {out} is a file; name a folder")
    told = submission.read(out)
    for path in (plan.code, out / submission.CONFIG):
        if told is None and os.path.lexists(path):
            raise UserError(f"{path} is of no submitted run, and would be replaced; name another folder, or remove it")
    holding = [run for run in plan.runs() if (run / "config.yaml").exists() or submission.path(run).exists()]
    if told is None and not holding:
        return [f"--resume: {out} holds no run; it begins at step 0"] if resume else []
    if not resume:
        number = f" (job {told.job})" if told is not None and told.job else ""
        where = out if told is not None else holding[0]
        raise UserError(
            f"--out {where} already holds a run{number}; add --resume to go on with it, or name another folder"
        )
    if told is not None and (told.runs, bool(told.sweep)) != (tuple(m.folder for m in plan.members), bool(plan.sweep)):
        kind = f"a sweep of {len(told.runs)} runs" if told.sweep else "a single run"
        raise UserError(
            f"--out {out} holds {kind}, and not what --sweep says now; give the same --sweep, or another --out"
        )
    notes = []
    if told is not None and told.cluster.world_size != plan.cluster.world_size:
        notes.append(
            f"{plan.cluster.world_size} processes, where there were {told.cluster.world_size}: "
            "it goes on, but not bit for bit as it would have; give the same keys of the cluster for that"
        )
    for member, run in zip(plan.members, plan.runs()):
        for line in _resumable(member.config, run):
            notes.append(line if member.folder == "." else f"{member.folder}: {line}")
    if told is not None:
        notes += refuse_live(out, told)
    for run in plan.runs():
        its = submission.read(run)
        if its is not None and not (told is not None and its.job in (told.job, f"{told.job}_{its.index}")):
            notes += refuse_live(run, its)  # it was submitted again, alone
        if (who := holder(run)) is not None:
            raise UserError(f"--out {run} is in use by {who}; wait for it or stop it")
    return list(dict.fromkeys(notes))


def refuse_live(run: Path, told: Submission) -> list[str]:
    """UserError if its job waits or runs. [what to say] if nobody can tell."""
    if told.job is None:
        return []
    stop = f"wait for it, or end it first: selfsup cancel {shlex.quote(str(run))}"
    if told.kind != "slurm":
        from . import local

        if local.supervisor_alive(run):
            raise UserError(f"--out {run}: {told.job} still runs; {stop}")
        return []
    found = slurm.jobs([told.job])
    if told.job not in found:
        return [f"Slurm does not answer: whether job {told.job} of {run} has ended is not known"]
    state = found[told.job].state
    if state in slurm.WAITING | slurm.RUNNING | slurm.HALTED | slurm.ENDING:
        raise UserError(f"--out {run}: its job {told.job} is {state}; {stop}")
    return []


def _resumable(config: Config, run: Path) -> list[str]:
    from selfsup import runfolder  # torch comes with it

    stored = runfolder.stored_config(run)
    if stored is None:
        return []  # it never began
    adopted = runfolder.adopt(config, stored)
    if config.method.name == stored.method.name:  # the run's configuration has all options, ours those that were given
        section = stored.method.model_copy(update=config.method.model_dump())
        adopted = adopted.model_copy(update={"method": section})
    try:
        return runfolder.check_resume(adopted, stored)
    except UserError as error:
        raise UserError(f"--out {run}: {error}") from None
