"""The verbs that give advice: doctor, stats and backbones, before a run; health, during and after it. See `selfsup.cli`."""

from pathlib import Path
from typing import Annotated

import typer

from selfsup.errors import UserError


def register(app: typer.Typer) -> None:
    """Add the verbs."""

    @app.command()
    def doctor(
        data: Annotated[
            str | None,
            typer.Argument(help="What data= would be: a folder, a list, a .zip, demo, torchvision:NAME:ROOT."),
        ] = None,
        as_json: Annotated[bool, typer.Option("--json", help="One object, for programs.")] = False,
        sample: Annotated[int, typer.Option(min=1, help="At most so many images are decoded.")] = 500,
        seconds: Annotated[
            float, typer.Option(min=0.1, help="Of looking for duplicates, and again of decoding.")
        ] = 30.0,
        out: Annotated[Path, typer.Option(help="Where the run folder will be: its disk is looked at.")] = Path("runs"),
    ) -> None:
        """Look at images and this machine; propose a recipe and others, with reasons and commands; without DATA the machine."""
        from selfsup import doctor as examining

        examining.run(data, as_json=as_json, sample=sample, seconds=seconds, out=out)

    @app.command()
    def backbones(
        pattern: Annotated[
            str | None,
            typer.Argument(help="A part of a name, or with * and ? as in a shell; default: a few of every family."),
        ] = None,
        size: Annotated[int, typer.Option(min=1, help="Pixels of the image, square.")] = 224,
        as_json: Annotated[bool, typer.Option("--json", help="A list of objects, with every reason.")] = False,
        names: Annotated[bool, typer.Option("--names", help="Names alone.")] = False,
    ) -> None:
        """List backbones: parameters, GFLOPs, tokens, strides, and which methods take them, or why not."""
        from selfsup import catalogue

        catalogue.run(pattern, size=size, as_json=as_json, names=names)

    @app.command()
    def stats(
        data: Annotated[
            str, typer.Argument(help="What data= would be: a folder, a list, a .zip, demo, torchvision:NAME:ROOT.")
        ],
        channels: Annotated[
            int | None, typer.Option(min=1, help="Read as so many channels; default: as most images are stored.")
        ] = None,
        sample: Annotated[
            int | None, typer.Option(min=1, help="Only so many images, a seeded choice; default: all.")
        ] = None,
        clip: Annotated[
            tuple[float, float], typer.Option(help="Percentiles of the proposed value range of what is not 8 bit.")
        ] = (0.1, 99.9),
        nodata: Annotated[
            float | None, typer.Option(help="A value that stands for nothing; default: what a GeoTIFF names.")
        ] = None,
        background: Annotated[
            tuple[int, int, int], typer.Option(help="Red, green, blue under transparent pixels, as data.background.")
        ] = (255, 255, 255),
        workers: Annotated[int, typer.Option(min=0, help="Processes.")] = 2,
        out: Annotated[Path | None, typer.Option(help="Write the recipe's keys to this YAML file.")] = None,
        picture: Annotated[
            Path | None, typer.Option(help="Draw a histogram of each channel; default beside --out.")
        ] = None,
        as_json: Annotated[bool, typer.Option("--json", help="One object, for programs.")] = False,
    ) -> None:
        """Mean, spread, range and percentiles of each channel as it is stored, and the keys of a recipe that follow from them."""
        from selfsup.eval import stats as counting

        if picture is None and out is not None:
            picture = out.with_suffix(".png")
        counting.run(
            data,
            channels=channels,
            sample=sample,
            clip=clip,
            nodata=nodata,
            background=background,
            workers=workers,
            out=out,
            picture=picture,
            as_json=as_json,
        )

    @app.command()
    def health(
        run: Annotated[Path, typer.Argument(help="The run folder, of a run that goes on or is over.")],
        as_json: Annotated[bool, typer.Option("--json", help="One object, for programs.")] = False,
        picture: Annotated[bool, typer.Option(help="Draw RUN/health.png.")] = True,
        check: Annotated[
            bool, typer.Option("--check", help="Exit 2 if there is a problem; otherwise the exit code is 0.")
        ] = False,
    ) -> None:
        """Say whether a run collapses, diverges, refuses steps, starves for data or is fine, since when, and what to change."""
        from selfsup.eval import health as judging

        judging.run(run, _state(run), as_json=as_json, picture=picture, check=check)


def _state(run: Path) -> str | None:
    """As `selfsup status` says; None for a folder that it does not know."""
    from selfsup.launch import status

    try:
        found = status.describe([run])
    except UserError:
        return None
    return found[0].state if len(found) == 1 else None
