"""The verb that writes an enlarged data set. Registered in `selfsup.cli`."""

from pathlib import Path
from typing import Annotated

import typer

from selfsup.errors import UserError


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command(
        epilog="Recipes: all, colour, crops, flips, labelled, noise, rotation, style; --recipes says what each is."
    )
    def augment(
        data: Annotated[
            str | None, typer.Argument(metavar="IN", help="What data= would be: a folder, a list, a .zip, demo, ...")
        ] = None,
        out: Annotated[
            str | None, typer.Argument(metavar="OUT", help="A new folder; the images are in OUT/images.")
        ] = None,
        words: Annotated[
            list[str] | None,
            typer.Argument(
                metavar="[KEY=VALUE]...",
                help="recipe=NAME|FILE, copies=N, and keys of operations as they have them in views.global: rotate=15 "
                "fill=reflect hflip=0.5 ...; masks=FOLDER, boxes=FILE.json, styles=FOLDER, module=package.module:Class, "
                "transfer=BACKBONE, format=jpeg, workers=N, seed=N.",
            ),
        ] = None,
        resume: Annotated[bool, typer.Option("--resume", help="Go on with OUT; it ends with the same bytes.")] = False,
        show: Annotated[
            str | None,
            typer.Option("--show", metavar="RECIPE", help="Draw what a recipe does to images of data=, and stop."),
        ] = None,
        picture: Annotated[Path | None, typer.Option(help="Of --show; default augment_RECIPE.png.")] = None,
        recipes: Annotated[bool, typer.Option("--recipes", help="List the recipes, one a line.")] = False,
        print_config: Annotated[
            bool, typer.Option("--print-config", help="Show all keys of the recipe and stop.")
        ] = False,
    ) -> None:
        """Write an enlarged data set: selfsup augment PHOTOS OUT recipe=rotation copies=4. Masks and boxes move with images.

        OUT/images keeps class folders, so that data=OUT/images trains on it; OUT/manifest.jsonl holds for each file its source
        and what was drawn, a function of seed, image and copy. Same keys in training: views.global.rotate=15, without writing.
        """
        from selfsup import augment as augmenting

        given = [word for word in (data, out, *(words or [])) if word is not None]
        if recipes:
            for name, text in augmenting.recipe_texts().items():
                typer.echo(f"{name:12} {text.splitlines()[0].removeprefix('#').strip()}")
        elif show is not None:
            _show(show, given, picture)
        elif print_config:
            typer.echo(augmenting.resolve([word for word in given if "=" in word]).text(), nl=False)
        elif data is None or out is None:
            raise UserError(
                "give IN and OUT, as in selfsup augment PHOTOS BIGGER recipe=rotation copies=4, or --show RECIPE"
            )
        else:
            counts = augmenting.run(data, Path(out), words or [], resume)
            bad = f", {counts['bad']} could not be read" if counts["bad"] else ""
            typer.echo(
                f"{out}/images: {counts['files']:,} files of {counts['images']:,} images{bad}; next: data={out}/images"
            )


def _show(recipe: str, given: list[str], picture: Path | None) -> None:
    from selfsup import augment as augmenting
    from selfsup.augment.show import show
    from selfsup.eval.shown import check_picture

    data = [word for word in given if word.startswith("data=")]
    if stray := [word for word in given if "=" not in word]:
        raise UserError(f"--show: {stray[0]!r} is no KEY=VALUE; give the images as data={stray[0]}")
    config = augmenting.resolve([word for word in given if word not in data], recipe)
    out = picture or Path(f"augment_{Path(recipe).stem}.png")
    check_picture(out, "--picture")
    rows = show(config, data[-1].removeprefix("data=") if data else "demo", out)
    typer.echo(f"{out}: {', '.join(rows)}")
