"""Keys of what is made of an image: `views.global`, `views.local`."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from selfsup.schema.kinds import Level, Positive, Probability, Range, Section


class Crops(Section):
    """One kind of view: how many, how large, and what happens to them.

    A probability given as a list holds one value a view (DINO blurs its two global views with p = 1.0 and 0.1).
    """

    count: Annotated[int, Field(ge=0)] = 2
    size: Positive = 224
    """Pixels, square."""
    scale: Range = (0.4, 1.0)
    """Area of the crop as a fraction of the image."""
    ratio: Range = (3 / 4, 4 / 3)
    """Aspect ratio, width / height."""
    frames: Positive | None = None
    """Of a clip of this kind of views; null: data.frames. Local clips may be shorter in time as well as in space."""
    stride: Positive | None = None
    """From one frame to the next; null: data.stride."""
    slices: Positive | None = None
    """Of a crop of volumes; null: as many as `size`."""
    extent: Range | None = None
    """Of volumes: a crop covers so many times its own voxels along each axis, whatever scale and ratio are, and [1, 1] cuts it
    without resampling; null: scale and ratio, as parts of the volume."""
    dflip: Probability = 0.0
    """Of volumes: flips along the depth."""
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    """Of images; volumes are resampled trilinearly."""
    hflip: Probability = 0.5
    vflip: Probability = 0.0
    jitter: Probability | tuple[Probability, ...] = 0.8
    """Probability that colour is jittered at all."""
    brightness: Annotated[float, Field(ge=0)] = 0.4
    contrast: Annotated[float, Field(ge=0)] = 0.4
    saturation: Annotated[float, Field(ge=0)] = 0.2
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    grayscale: Probability | tuple[Probability, ...] = 0.2
    blur: Probability | tuple[Probability, ...] = 0.5
    blur_sigma: Range = (0.1, 2.0)
    """Standard deviation of the Gaussian in pixels."""
    solarize: Probability | tuple[Probability, ...] = 0.0
    solarize_threshold: Level = 128
    policy: Literal["none", "randaugment", "autoaugment", "trivialaugment"] = "none"
    """Drawn operations on the crop before all others; for 1 or 3 channels."""
    policy_probability: Probability = 1.0
    """Part of the crops that get one."""
    policy_ops: Annotated[int, Field(ge=1, le=14)] = 2
    """Of RandAugment: operations one after another, N."""
    policy_magnitude: Annotated[int, Field(ge=0, le=30)] = 9
    """Of RandAugment: their strength, M."""
    policy_table: Literal["imagenet", "cifar10", "svhn"] = "imagenet"
    """Of AutoAugment: the data set on which it was found."""
    policy_fill: Level | tuple[Level, ...] = 128
    """Where an operation leaves nothing: a level, or one a channel."""
    policy_interpolation: Literal["nearest", "bilinear"] = "bilinear"
    lighting: Annotated[float, Field(ge=0)] = 0.0
    """PCA colour noise (Krizhevsky et al., 2012; their value is 0.1): standard deviation; for 3 channels."""
    erase: Probability | tuple[Probability, ...] = 0.0
    """Random erasing (Zhong et al., 2020): probability."""
    erase_area: Range = (0.02, 0.33)
    """Of the box, as a fraction of the crop."""
    erase_ratio: Range = (0.3, 3.3)
    """Height / width."""
    erase_fill: Literal["zero", "noise", "mean"] = "zero"
    """zero: the data's mean; noise: normal, for each pixel and channel; mean: the crop's own mean colour."""
    cutout: Annotated[int, Field(ge=0)] = 0
    """Cutout (DeVries and Taylor, 2017): pixels along the side of a square set to the data's mean; 0: none."""
    rotate: Annotated[float, Field(ge=0, le=180)] = 0.0
    """By up to so many degrees either way, before colours change; as are the next four."""
    translate: Annotated[float, Field(ge=0, le=1)] = 0.0
    """By up to this fraction of width and height."""
    zoom: Range = (1.0, 1.0)
    """Times; below 1 smaller."""
    shear: Annotated[float, Field(ge=0, le=80)] = 0.0
    """By up to so many degrees along each axis."""
    affine: Probability = 1.0
    """Of rotation, translation, zoom and shear together."""
    fill: Literal["constant", "edge", "reflect", "symmetric", "wrap"] = "constant"
    """What they show beyond the image, as of numpy.pad."""
    fill_level: Level | None = None
    """Of constant fill; null: the data's mean."""
    style: Literal["none", "fourier", "statistics"] = "none"
    """Of another image of the data: its low frequencies' amplitudes (FDA; Yang & Soatto, 2020), or each channel's mean and
    standard deviation (AdaIN of pixels; Huang & Belongie, 2017)."""
    style_probability: Probability = 1.0
    fourier_beta: Range = (0.005, 0.03)
    """The highest frequency that is taken, as a part of the shorter side."""
    module: str | None = None
    """`package.module:Class`, an image-to-image network for values in [0, 1], used as it is, before colours change."""
    module_probability: Probability = 1.0
    noise: Probability = 0.0
    """Gaussian noise on each value, last of all but salt and pepper."""
    noise_std: tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(ge=0)]] = (0.0, 20.0)
    """Its standard deviation in levels of 255."""
    salt_pepper: Probability = 0.0
    """Some pixels become white or black."""
    salt_pepper_part: tuple[Probability, Probability] = (0.0, 0.05)

    @model_validator(mode="after")
    def _check(self) -> "Crops":
        for key in ("scale", "ratio", "blur_sigma", "erase_area", "erase_ratio", "zoom", "fourier_beta", "extent"):
            low, high = getattr(self, key) or (1, 1)
            if not 0 < low <= high:
                raise ValueError(f"{key} must be two numbers, 0 < low <= high; seen ({low}, {high})")
        for key in ("scale", "erase_area"):
            if getattr(self, key)[1] > 1:
                raise ValueError(f"{key} is a fraction of the image's area, at most 1; seen {getattr(self, key)}")
        for key in ("noise_std", "salt_pepper_part"):
            low, high = getattr(self, key)
            if low > high:
                raise ValueError(f"{key} must be two numbers, low <= high; seen ({low}, {high})")
        if self.fourier_beta[1] > 0.45:
            raise ValueError(f"fourier_beta is a part of the shorter side, at most 0.45; seen {self.fourier_beta}")
        if self.cutout > self.size:
            raise ValueError(f"cutout={self.cutout} is larger than the crop of {self.size} pixels")
        for key in ("jitter", "grayscale", "blur", "solarize", "erase"):
            value = getattr(self, key)
            if isinstance(value, tuple) and len(value) != self.count:
                raise ValueError(
                    f"{key} holds {len(value)} probabilities for {self.count} views; give one a view, or one for all"
                )
        return self

    def highest(self, key: str) -> float:
        """The largest probability `key` of any view."""
        value = getattr(self, key)
        return max(value) if isinstance(value, tuple) else value

    @property
    def shape(self) -> int | tuple[int, int, int]:
        """`size`, or of volumes (depth, height, width) where the depth is another."""
        return self.size if self.slices is None else (self.slices, self.size, self.size)

    def probability(self, key: str, view: int) -> float:
        """The probability `key` of the view with this index."""
        value = getattr(self, key)
        return value[view] if isinstance(value, tuple) else value


class ViewsConfig(Section):
    """Multi-crop (Caron et al., 2020, SwAV, section 3.3; the values of DINO's published code)."""

    global_: Crops = Field(default=Crops(blur=(1.0, 0.1), solarize=(0.0, 0.2)), alias="global")
    local: Crops = Crops(count=8, size=96, scale=(0.05, 0.4))

    def colour_keys(self) -> list[str]:
        """What is on, but is for images of three channels alone."""
        kinds = [crops for crops in (self.global_, self.local) if crops.count]
        jittered = [c for c in kinds if c.highest("jitter") > 0]
        found = [key for key in ("saturation", "hue") if any(getattr(c, key) for c in jittered)]
        return found + (["grayscale"] if any(c.highest("grayscale") > 0 for c in kinds) else [])

    @model_validator(mode="before")
    @classmethod
    def _keep_defaults(cls, values: Any) -> Any:
        """A kind of which some keys are given keeps its own defaults for the others, not those of `Crops`."""
        if not isinstance(values, Mapping):
            return values
        out = dict(values)
        for name, field in cls.model_fields.items():
            for key in (name, field.alias):
                if isinstance(given := out.get(key), Mapping):
                    out[key] = {**field.default.model_dump(), **given}
        return out
