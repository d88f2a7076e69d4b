"""`selfsup report`: gathers what `selfsup status` knows and the methods' defaults, which the page may not import."""

import contextlib
import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from selfsup.config import Config
from selfsup.errors import UserError

FILE = "report.html"


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command()
    def report(
        runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders, sweeps, or folders of runs.")],
        out: Annotated[
            Path | None,
            typer.Option(metavar="FILE.html", help="The page; default RUN/report.html, of several runs ./report.html."),
        ] = None,
    ) -> None:
        """One self-contained HTML page: what ran, curves, evaluations, pictures, recipe. Several runs are compared.

        `selfsup train` and `selfsup submit` write RUN/report.html when training is done, unless report=false.
        """
        from selfsup.launch import status

        found = status.describe(runs)
        if not found:
            raise UserError(f"{', '.join(map(str, runs))}: no run in it")
        if out is None:
            out = (Path(found[0].run) if len(found) == 1 else runs[0] if len(runs) == 1 else Path()) / FILE
        nbytes = _write(found, out)
        typer.echo(
            f"{out}: {len(found)} run{'s' if len(found) > 1 else ''}, {max(nbytes / 1e6, 0.1):.1f} MB; open it in a browser"
        )


def after_training(config: Config, run: Path) -> None:
    """RUN/report.html of a run that has just ended, by rank 0; what goes wrong is a line on stderr, and the run is done."""
    from selfsup import dist

    if not config.report or not dist.is_main():
        return
    try:
        from selfsup.launch import status

        _write([dataclasses.replace(status.of_folder(run), state="completed", eta_s=None)], run / FILE)
    except Exception as error:
        with contextlib.suppress(OSError):
            print(f"no {FILE}: {type(error).__name__}: {error}; `selfsup report {run}` tries again", file=sys.stderr)


def _write(found: list[Any], out: Path) -> int:
    """found: of `launch.status`. The bytes of the page."""
    from selfsup.eval.report import page

    return page.write([{**each.as_json(), "remarks": each.remarks} for each in found], out, _defaults)


def _defaults(method: str) -> dict[str, Any]:
    """The configuration with nothing said but the method; of one that cannot be imported here, without its options."""
    from selfsup import methods

    plain = Config()
    with contextlib.suppress(UserError):
        plain = methods.complete(Config.model_validate({"method": {"name": method}}))
    return plain.model_dump(mode="json", by_alias=True)
