"""The `selfsup` command. Each subcommand imports what it needs when it runs, so that help is immediate."""

import contextlib
import errno
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from selfsup import cli_advice, cli_augment, cli_eval, cli_jobs, cli_report
from selfsup import config as configuration
from selfsup.cli_eval import EVALUATIONS
from selfsup.errors import EarlyStop, RankLost, UserError

app = typer.Typer(
    help="Train visual backbones without labels and by distillation; evaluate them; take them away.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, as in data=FOLDER optimizer.lr=1e-3 steps=50."),
]
PrintConfig = Annotated[bool, typer.Option("--print-config", help="Show the resolved configuration and stop.")]


@app.command()
def demo(
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="Folder for the run, its pictures and its table.")] = Path("runs/demo"),
    print_config: PrintConfig = False,
) -> None:
    """The whole story on bundled real images: train DINO, evaluate, draw, export. CPU, minutes."""
    if print_config:
        _print_config(configuration.load("demo", overrides or []))
        return
    from selfsup.eval.demo import run_demo
    from selfsup.train import train as trainer

    config = configuration.load("demo", overrides or [])
    # a demo that was interrupted goes on; one that is finished is evaluated again
    run_demo(config, out, lambda c, path: trainer(c, out=path, resume=True, evaluate=_periodic(c, path)))


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A built-in recipe (see `selfsup recipes`) or a YAML file.")],
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="The run folder; default runs/RECIPE.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    print_config: PrintConfig = False,
) -> None:
    """Train as a recipe says: a plain process, under torchrun, or under SLURM. Exits 75 when stopped early and resumable.

    When it is done, RUN/report.html shows what it did, unless report=false.
    """
    config = configuration.load(recipe, overrides or [])
    if print_config:
        _print_config(config)
        return
    out = out or _default_folder(recipe, resume)
    from selfsup.train import train as trainer

    _hold_signals()
    classify = cli_eval.classifying(config, out)
    result = trainer(config, out=out, resume=resume, evaluate=_periodic(config, out), classify=classify)
    from selfsup import dist

    cli_eval.final_table(config, out)
    cli_report.after_training(result.config, out)
    if dist.is_main():
        with contextlib.suppress(OSError):  # nobody reads it any more: the run is done all the same
            typer.echo(
                f"done: {result.steps} steps; the backbone is in {out / 'backbone'}; next: selfsup eval knn {out}"
            )


def _periodic(config: configuration.Config, out: Path) -> Any:
    """k-NN during training if `eval.every` asks for it; without labels it is left out, unless eval.train names some."""
    if not config.eval.every:
        return None
    if config.eval.as_jobs:
        return _as_jobs(out)
    from selfsup.eval.periodic import knn_callable

    try:
        return knn_callable(config, out)
    except UserError as error:
        if config.eval.train is not None:
            raise
        if os.environ.get("RANK", "0") == "0":
            print(f"no k-NN during training: {error}", file=sys.stderr)
        return None


def _as_jobs(out: Path) -> Any:
    from selfsup.backbones.export import export_timm
    from selfsup.launch.evaluations import as_jobs

    return as_jobs(out, export_timm)


def _print_config(config: configuration.Config) -> None:
    from selfsup import methods, runtime

    typer.echo(configuration.dump(methods.complete(runtime.resolve(config))), nl=False)


def _default_folder(recipe: str, resume: bool) -> Path:
    if resume:
        raise UserError("--resume needs --out RUN: the folder of the run to go on with")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("several processes need --out RUN: the folder they share")
    name = Path(recipe).stem
    folder, n = Path("runs") / name, 1
    while folder.exists():
        n += 1
        folder = Path("runs") / f"{name}-{n}"
    return folder


@app.command(name="eval", epilog=cli_eval.described())
def evaluate(
    task: Annotated[str, typer.Argument(help="One of those below.")],
    target: Annotated[
        str, typer.Argument(help="Run, RUN@student, backbone folder or checkpoint; `pixels`; `random:RUN`.")
    ],
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="Result file; default RUN/eval/TASK.json; for pictures RUN/pictures/TASK.png.")
    ] = None,
    print_config: PrintConfig = False,
) -> None:
    """Evaluate a backbone, what was trained to tell classes, or look at features: `selfsup eval knn RUN data=FOLDER`."""
    cli_eval.check(task)
    if print_config:
        from selfsup.eval import settings

        typer.echo(configuration.dump(settings.resolve(task, overrides or [])), nl=False)
        return
    cli_eval.evaluate(task, target, overrides or [], out)


@app.command()
def export(
    target: Annotated[str, typer.Argument(help="Run, RUN@student, RUN@exit2, backbone folder or checkpoint.")],
    out: Annotated[Path, typer.Argument(help="Folder (timm) or file (onnx, torch) to write.")],
    format: Annotated[str, typer.Option(help="timm, onnx, or torch (torch.export, .pt2).")] = "timm",
) -> None:
    """Write a backbone for others: a folder that timm.create_model("local-dir:OUT", pretrained=True) loads, ONNX, or a .pt2 file.

    RUN@exit2: an exit of a run of method=byot, with the stages before it alone; selfsup.load_exit(OUT) loads it.
    """
    if format not in ("timm", "onnx", "torch"):
        raise UserError(f"--format {format!r}: known are timm, onnx and torch")
    run, at, part = target.rpartition("@")
    if at and part not in ("student", "teacher") and not Path(target).exists():
        from selfsup.exits import export_target

        if format == "torch":
            raise UserError(f"{target}: an exit is written as timm or onnx; --format torch takes whole backbones")
        typer.echo(export_target(run, part, out, format))
        return
    from selfsup.backbones import export as exporting
    from selfsup.backbones import load_backbone

    backbone = load_backbone(target)
    if format == "timm":
        exporting.export_timm(backbone, out)
        if why := exporting.only_here(backbone.options):
            typer.echo(f'{out}: selfsup.load_backbone("{out}"); bare timm cannot load it: {why}')
            return
        difference = exporting.timm_difference(backbone, out)
        call = f'timm.create_model("local-dir:{out}", pretrained=True)'
        if what := exporting.unknown_to_timm(backbone):
            call = f'selfsup.load_backbone("{out}") ({what}, which bare timm does not know)'
        typer.echo(f"{out}: {call}; largest difference to ours {difference:g}")
    else:
        from selfsup.backbones.program import export_program

        difference = export_program(backbone, out) if format == "torch" else exporting.export_onnx(backbone, out)
        typer.echo(f"{out}: largest difference to ours {difference:.2e}")


@app.command()
def replay(
    folder: Annotated[Path, typer.Argument(metavar="FILE", help="A folder under RUN/refused.")],
) -> None:
    """Compute a refused step again and say where it stopped being finite: terms, modules, gradients, images."""
    from selfsup import replay as replaying

    replaying.run(folder)


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Show this recipe's text.")] = None,
    demo: Annotated[bool, typer.Option("--demo", help="Only those that run in minutes on two cores.")] = False,
    names: Annotated[bool, typer.Option("--names", help="Names alone.")] = False,
) -> None:
    """List the built-in recipes, one a line."""
    known = configuration.recipe_texts()
    if name is not None:
        if name not in known:
            raise UserError(f"no recipe {name!r}{configuration.suggest(name, known)}; known: {', '.join(known)}")
        typer.echo(known[name], nl=False)
        return
    for key, text in known.items():
        if demo and not (key == "demo" or key.endswith("_demo")):
            continue
        first = text.splitlines()[0].removeprefix("#").strip()
        typer.echo(key if names else f"{key:24} {first}")


cli_jobs.register(app, EVALUATIONS, _periodic)
cli_advice.register(app)
cli_report.register(app)
cli_augment.register(app)


def main() -> None:
    """Entry point: exit codes as the README lists them."""
    # with a busy neighbour, OpenMP's default spinning makes small models many times slower; must precede torch
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    code = 0
    try:
        code = app(standalone_mode=False) or 0
    except EarlyStop as stop:
        code = 75
        _say(str(stop))
    except UserError as error:
        code = 2
        _say(f"selfsup: {error}")
    except RankLost as lost:
        code = 1
        _say(f"selfsup: {lost}")
    except typer.Exit as exit_:
        code = exit_.exit_code
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except SystemExit as leaving:
        if not isinstance(leaving.__context__, BrokenPipeError):
            raise
        code = _after_broken_pipe(leaving.__context__)
    except Exception as error:
        import traceback

        if type(error).__module__.startswith(("click", "typer")) and hasattr(error, "format_message"):
            code = 2
            _say(f"selfsup: {error.format_message()}")  # a wrong option or argument
        elif isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:  # asked for its existence, it raises
            code = 2
            _say(f"selfsup: {str(error.filename)[:200]}...: {error.strerror}")
        else:
            code = 1
            _say(traceback.format_exc().rstrip())
    _leave(code)


def _say(text: str) -> None:
    """On stderr; one that is closed or on a full disk does not change the exit code."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def _after_broken_pipe(error: BrokenPipeError) -> int:
    """The exit code: 141, as of other tools in a shell, if nobody reads stdout or stderr any more, as with `| head -1`.

    Any other pipe, as between processes, is a defect; typer would exit 1 without a word on either.
    """
    import select
    import traceback

    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # none, or no file
            poll = select.poll()
            poll.register(stream.fileno(), 0)
            if any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
                return 141
    _say("".join(traceback.format_exception(error)).rstrip())
    return 1


def _flush() -> None:
    """What cannot be written is dropped: at its end the interpreter would try again, and exit 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _hold_signals() -> None:
    """Stop signals are a flag from here on: before training begins it waits for them, after it they change nothing."""
    from selfsup.signals import StopSignals

    StopSignals().__enter__()


def _leave(code: int) -> None:
    _flush()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "torch.distributed" in sys.modules:
        from selfsup import dist

        if code in (0, 75):  # every rank comes here; after an error on one rank the others may not
            dist.shutdown()
        os._exit(code)  # interpreter shutdown can abort with collectives' threads alive
    if "selfsup.signals" in sys.modules:
        import signal

        from selfsup.signals import STOP_SIGNALS

        for number in STOP_SIGNALS:  # the interpreter's end would put the deadly defaults back
            signal.signal(number, signal.SIG_IGN)
    sys.exit(code)


if __name__ == "__main__":
    main()
