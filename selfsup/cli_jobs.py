"""The verbs about jobs: submit, status, logs, cancel; and what a job itself runs. Registered in `selfsup.cli`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from selfsup import cli_eval, cli_report
from selfsup.config import Config
from selfsup.errors import UserError

Words = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")]
Evaluate = Callable[[str, str, list[str], Path | None], None]


def register(app: typer.Typer, evaluations: dict[str, str], periodic: Callable[[Config, Path], Any]) -> None:
    """Add the verbs. evaluations: tasks of `selfsup eval`; periodic: makes the callable that evaluates during training."""

    @app.command()
    def submit(
        recipe: Annotated[str, typer.Argument(help="A built-in recipe (see `selfsup recipes`) or a YAML file.")],
        overrides: Annotated[
            list[str] | None,
            typer.Argument(
                metavar="[KEY=VALUE]...",
                help="Keys of the recipe and of the cluster, as in data=FOLDER epochs=100 nodes=2 time=12:00:00.",
            ),
        ] = None,
        cluster: Annotated[
            str, typer.Option(help="slurm, local (in the background here), debug (in this terminal), or a YAML file.")
        ] = "slurm",
        out: Annotated[
            Path | None, typer.Option(help="The run folder, seen by every node; default runs/RECIPE.")
        ] = None,
        then: Annotated[
            list[str] | None,
            typer.Option(help="Evaluations that follow: knn,linear; or 'knn k=10,20' with keys. May be repeated."),
        ] = None,
        sweep: Annotated[
            list[str] | None,
            typer.Option(metavar="KEY=A,B", help="One run for each value; several: for each combination."),
        ] = None,
        resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
        dry_run: Annotated[
            bool, typer.Option("--dry-run", help="Print the exact script and environment; submit and write nothing.")
        ] = False,
    ) -> None:
        """Train as a job that survives preemption, time limits and lost nodes: Slurm, or this machine.

        When training is done, RUN/report.html shows what it did, unless report=false.
        """
        from selfsup.launch.submit import submit as submitting

        submitting(
            recipe,
            overrides or [],
            cluster=cluster,
            out=out,
            then=then or [],
            sweep=sweep or [],
            resume=resume,
            dry_run=dry_run,
            check=_check_method,
            tasks=tuple(evaluations),
            check_evaluation=_check_evaluation,
        )

    @app.command()
    def status(
        runs: Annotated[
            list[Path] | None, typer.Argument(help="Run folders, sweeps, or folders of runs; default: runs.")
        ] = None,
        as_json: Annotated[bool, typer.Option("--json", help="A list of objects, for programs.")] = False,
        verify: Annotated[
            bool, typer.Option("--verify", help="Compute the digests of all checkpoints; exit 2 if one is damaged.")
        ] = False,
    ) -> None:
        """How runs stand: state, step, time left, img/s, k-NN, restarts, host; --verify checks every checkpoint."""
        from selfsup.launch import status as looking

        if not runs and not Path("runs").is_dir():
            raise UserError("no folder `runs` here: name run folders, as in selfsup status RUN")
        found = looking.describe(runs or [Path("runs")])
        if as_json:
            typer.echo(json.dumps([each.as_json() for each in found], indent=1))
        else:
            typer.echo(looking.table(found))
        if verify:
            _verify([Path(each.run) for each in found])

    @app.command()
    def logs(
        run: Annotated[Path, typer.Argument(help="The run folder.")],
        follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on printing until the run has ended.")] = False,
        rank: Annotated[int | None, typer.Option(min=0, help="Of this rank; default 0.")] = None,
    ) -> None:
        """What a submitted run prints."""
        from selfsup.launch import logs as logging

        logging.show(run, rank=rank, follow=follow)

    @app.command()
    def cancel(run: Annotated[Path, typer.Argument(help="The run folder, or a sweep's.")]) -> None:
        """End a submitted run and its evaluations; it saves first, and `submit --resume` goes on with it."""
        from selfsup.launch import cancel as cancelling

        cancelling.cancel(run)

    @app.command(hidden=True)
    def job(
        action: Annotated[str, typer.Argument(help="train, eval, table or supervise.")],
        folder: Annotated[Path, typer.Argument(help="Of the run, or of the sweep.")],
        words: Words = None,
    ) -> None:
        """What jobs run; for people there is submit."""
        if action == "train":
            from selfsup.launch.job import run_training

            run_training(folder, lambda config, run: _train(config, run, periodic))
        elif action == "eval" and words:
            from selfsup.launch.job import run_evaluation

            run_evaluation(folder, words[0], words[1:], _evaluate)
        elif action == "table":
            from selfsup.launch import table

            table.write(folder)
        elif action == "supervise":
            from selfsup.launch import local

            local.supervise(folder)
        else:
            raise UserError(f"job {action!r}: known are train, eval (with a task), table, supervise")


def _train(config: Config, run: Path, periodic: Callable[[Config, Path], Any]) -> None:
    from selfsup.train import train as trainer

    classify = cli_eval.classifying(config, run)
    result = trainer(config, out=run, resume=True, evaluate=periodic(config, run), classify=classify)
    from selfsup import dist

    cli_eval.final_table(config, run)
    cli_report.after_training(result.config, run)
    if dist.is_main():
        typer.echo(f"done: {result.steps} steps; the backbone is in {run / 'backbone'}")


def _evaluate(task: str, run: Path, overrides: list[str]) -> None:
    cli_eval.evaluate(task, str(run), overrides, None)


def _check_method(config: Config) -> Config:
    """With the options of the method, which its own schema knows. Raises UserError."""
    from selfsup import methods

    return methods.complete(config)


def _check_evaluation(task: str, overrides: list[str]) -> None:
    from selfsup.eval import settings

    settings.resolve(task, overrides)


def _verify(runs: list[Path]) -> None:
    from selfsup import status as looking

    damaged = 0
    for run in runs:
        typer.echo(f"{run}:")
        for checked in looking.verify(run):
            damaged += checked.problem is not None
            typer.echo(f"  {checked.folder.name}  {checked.nbytes / 1e6:8.1f} MB  {checked.problem or 'valid'}")
    if damaged:
        raise UserError(f"{damaged} damaged checkpoint(s); --resume passes over them to the newest valid one")
