"""What `selfsup augment` is told: a recipe of operations, by the names they have in `views.global`, and how to write it all."""

from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, model_validator

from selfsup import config as configuration
from selfsup.config import Crops, Positive, Probability, ValueRange
from selfsup.errors import UserError

_FOR_VIEWS = ("count", "size", "policy", "erase", "cutout", "frames", "stride", "slices", "extent", "dflip")
"""Beginnings of keys of views that a data set is not written with: sizes stay, and what hides parts is for the loader."""

_QUIET = {"scale": (1.0, 1.0), "hflip": 0.0, "jitter": 0.0, "grayscale": 0.0, "blur": 0.0}
"""Of what views have by default, nothing is done unless it is asked for."""

SWITCHES = {
    "crop": ("scale", "ratio", "interpolation"),
    "hflip": (),
    "vflip": (),
    "rotate": ("fill", "fill_level"),
    "translate": ("fill", "fill_level"),
    "zoom": ("fill", "fill_level"),
    "shear": ("fill", "fill_level"),
    "style": ("fourier_beta", "styles"),
    "module": (),
    "transfer": ("transfer_steps", "transfer_weight", "transfer_layers", "styles"),
    "jitter": ("brightness", "contrast", "saturation", "hue"),
    "grayscale": (),
    "blur": ("blur_sigma",),
    "solarize": ("solarize_threshold",),
    "lighting": (),
    "noise": ("noise_std",),
    "salt_pepper": ("salt_pepper_part",),
}
"""Operations in their order, by the key that turns them on (crop: scale), and the keys that go with each."""

_CERTAIN = ("hflip", "vflip", "jitter", "grayscale", "blur", "solarize", "noise", "salt_pepper")


class AugmentConfig(Crops):
    """How a data set is enlarged. An operation has the keys and the meaning that it has in `views.global`."""

    scale: tuple[float, float] = _QUIET["scale"]  # type: ignore[assignment]
    """Area of the crop as a fraction of the image, which is enlarged to the image's size; `ratio` is then of the image's own."""
    hflip: Probability = 0.0
    jitter: Probability = 0.0
    grayscale: Probability = 0.0
    blur: Probability = 0.0
    solarize: Probability = 0.0
    transfer: str | None = None
    """Feature-statistics style transfer through this backbone (run, folder, file): see `transfer.py`."""
    transfer_probability: Probability = 1.0
    transfer_steps: Positive = 60
    """Of Adam, on the pixels."""
    transfer_weight: Annotated[float, Field(ge=0)] = 10.0
    """Of the style against the content."""
    transfer_layers: tuple[int, ...] | None = None
    """Of the backbone; null: four, or all of fewer, evenly spread."""
    styles: str | None = None
    """Images, as of data=, whose style is taken; null: those of the data set itself."""
    copies: Positive = 1
    """Of each image."""
    originals: bool = True
    """The images themselves are written too, as copy 0."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    channels: Positive | None = None
    """null: as the first image has."""
    value_range: ValueRange | None = None
    """As data.value_range: of what is not 8 bit, what becomes 0 and 255; everything is written with 8 bit."""
    format: Literal["png", "jpeg"] = "png"
    """More than 4 channels are written as .npy."""
    quality: Annotated[int, Field(ge=1, le=100)] = 95
    """Of jpeg."""
    masks: str | None = None
    """Folder of masks of ids, named as the images are; they are moved as the images are, without mixing ids."""
    ignore: Annotated[int, Field(ge=0, le=65535)] = 255
    """The id of what a mask shows beyond the image (fill=constant)."""
    boxes: str | None = None
    """A file of boxes in COCO's format; written anew for the enlarged data set."""
    visibility: Probability = 0.25
    """Boxes of which less than this part is still to be seen are left out."""
    max_bad_fraction: Probability = 0.05
    """Stop when more than this part of the images (and at least 10) could not be read."""
    workers: Annotated[int, Field(ge=0)] = 2
    batch: Positive = 16
    """Images that go through `module` or `transfer` at once, if they have one size."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Of `module` and `transfer`."""

    @model_validator(mode="after")
    def _check_written(self) -> "AugmentConfig":
        for key in sorted(self.model_fields_set):
            if key.startswith(_FOR_VIEWS):
                raise ValueError(f"{key} is of a training's views (views.global.{key}); leave it out here")
        if self.module and self.transfer:
            raise ValueError("module and transfer: give one of them")
        return self

    @property
    def on_device(self) -> bool:
        """Whether images go through a network."""
        return bool(self.module or self.transfer)

    @property
    def operations(self) -> list[str]:
        """Those that are on, in order."""
        return [name for name in SWITCHES if self._is_on(name)]

    def _is_on(self, name: str) -> bool:
        value = getattr(self, "scale" if name == "crop" else name)
        return bool(value and value not in ("none", (1.0, 1.0)))

    def alone(self, name: str) -> "AugmentConfig":
        """With one of its operations on, and that for certain."""
        keys = ("scale" if name == "crop" else name, *SWITCHES[name])
        values: dict[str, Any] = {key: getattr(self, key) for key in keys}
        if name in _CERTAIN:
            values[name] = 1.0
        return AugmentConfig.model_validate({**values, "seed": self.seed, "channels": self.channels})

    def text(self) -> str:
        """As YAML that is itself a recipe, but for what changes nothing that is written."""
        drop = {k for k in type(self).model_fields if k.startswith(_FOR_VIEWS)} | {"workers", "device"}
        return yaml.safe_dump(self.model_dump(mode="json", exclude=drop), sort_keys=False, allow_unicode=True)


def recipe_texts() -> dict[str, str]:
    """Name -> text of every built-in recipe; the first line is a comment that says what it is."""
    folder = resources.files("selfsup.augment.recipes")
    return {name: (folder / f"{name}.yaml").read_text() for name in configuration.file_names(folder)}


def resolve(words: list[str], recipe: str | None = None) -> AugmentConfig:
    """KEY=VALUE, of which recipe=NAME|FILE comes first. Raises UserError naming the key."""
    given = configuration.parse_overrides(words, {})
    recipe = recipe if recipe is not None else given.pop("recipe", None)
    if recipe is None and not given:
        raise UserError(f"no recipe=NAME or operation given; recipes: {', '.join(recipe_texts())}, or a YAML file")
    values: dict[str, Any] = {}
    if recipe is not None:
        values = configuration.read_named("recipe", str(recipe), resources.files("selfsup.augment.recipes"))
    where = f"recipe {recipe}" if recipe is not None else "augment"
    made = configuration.validate(AugmentConfig, {**values, **given}, where=where)
    for key in ("masks", "boxes"):
        path = getattr(made, key)
        if path is not None and not (Path(path).is_dir() if key == "masks" else Path(path).is_file()):
            raise UserError(f"{key}={path}: no such {'folder' if key == 'masks' else 'file'}")
    return made
