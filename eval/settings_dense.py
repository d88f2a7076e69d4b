"""Keys of the verbs that look at patch features without training: segment-knn, objects, propagate."""

from typing import Annotated, Literal

from pydantic import Field

from selfsup.config import Positive

from .settings import FeatureSettings, ImageSettings, PositiveFloat
from .settings_pictures import Few


class DenseSettings(FeatureSettings):
    """Keys shared by them. Images are squeezed to a square of `size`, whole, and masks stay as they are."""

    layer: int | None = None
    """Block of a ViT or stage of a pyramid; default: the last with at least 4 x 4 cells."""
    images: Few = 6
    """So many are shown in the picture."""


class SegmentKnnSettings(DenseSettings):
    """`selfsup eval segment-knn`: k-NN retrieval segmentation (Balazevic et al., 2023, section 3)."""

    masks: str | None = None
    """Folder of masks: files of class ids, each with its image's name (see `masks`)."""
    val_masks: str | None = None
    """Masks of `data.val`; without a val set a seeded part of the pairs is val."""
    ignore: Annotated[int, Field(ge=0, le=65_535)] = 255
    """Pixels of this id count nowhere."""
    k: Positive = 30
    temperature: PositiveFloat = 0.02
    """Of the softmax over the k cosines."""
    bank: Positive = 100_000
    """At most so many patches are searched (a seeded choice)."""


class ObjectsSettings(DenseSettings):
    """`selfsup eval objects`: the main object of each image."""

    by: Literal["tokencut", "lost", "attention"] = "tokencut"
    masks: str | None = None
    """Folder of masks to compare with; every id but 0 and `ignore` is object."""
    ignore: Annotated[int, Field(ge=0, le=65_535)] = 255
    features: Literal["keys", "output"] | None = None
    """Of tokencut and lost: keys of the last attention (default for ViTs), or the layer's output."""
    tau: Annotated[float, Field(ge=-1, le=1)] = 0.2
    """Of tokencut: patches of this cosine or more are joined."""
    k: Positive = 100
    """Of lost: patches of least degree among which the seed grows; at most half of all."""
    mass: Annotated[float, Field(gt=0, lt=1)] = 0.6
    """Of attention: the share that the mask holds."""


class PropagateSettings(ImageSettings):
    """`selfsup eval propagate`: masks of the first frame carried on (Caron et al., 2021, section 4.2.2). data=FRAMES."""

    masks: str | None = None
    """The first frame's mask, a file of object ids with 0 for none; or a folder with one for every frame, to score."""
    size: Positive | None = None
    """Shorter side in pixels. Default 480, or what the backbone is bound to."""
    layer: int | None = None
    context: Annotated[int, Field(ge=0)] = 7
    """Frames before, besides the first."""
    k: Positive = 5
    """Patches of the context that a patch takes its label from."""
    radius: Annotated[int, Field(ge=0)] = 12
    """They lie within so many patches, along each axis; 0: anywhere."""
    temperature: PositiveFloat = 0.1
    images: Few = 8
    """Frames shown in the picture."""


VERBS: dict[str, type[ImageSettings]] = {
    "segment-knn": SegmentKnnSettings,
    "objects": ObjectsSettings,
    "propagate": PropagateSettings,
}
