"""Keys of the verbs that draw: attention, pca, tsne, neighbors, augmentations."""

from typing import Annotated, Any

from pydantic import Field

from .settings import FeatureSettings, ImageSettings, Layer, Pooling

Few = Annotated[int, Field(ge=1, le=48)]
"""Columns or rows of a sheet."""


class AttentionSettings(FeatureSettings):
    """`selfsup eval attention`. Images: `eval.val`, `data.val`, `data`, or the val images of the run."""

    images: Few = 8
    """So many are shown: of each class one, then a second; without labels evenly spaced ones."""
    heads: Few = 6
    """At most so many, each in a row of its own below their mean."""


class PcaSettings(FeatureSettings):
    """`selfsup eval pca`. Images: as for `attention`."""

    images: Few = 8
    layer: int | None = None
    """Block of a ViT or stage of a pyramid; default: the last with at least 4 x 4 cells."""
    foreground: bool = False
    """Fit a second time on the cells whose first component is above `threshold`, and show the others black."""
    threshold: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    """Of the first component, whose mean is 0 and whose sign is turned so that the images' rims are low."""


class TsneSettings(FeatureSettings):
    """`selfsup eval tsne`. Images: as for `attention`."""

    points: Annotated[int, Field(ge=10, le=20_000)] = 1500
    """At most so many images (a seeded, stratified choice)."""
    thumbnails: Annotated[int, Field(ge=0, le=2_000)] = 250
    """At most so many of them are drawn as pictures, where there is room; 0: points alone."""
    perplexity: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 30.0
    pooling: Pooling = "pooled"
    layer: Layer = -1


class NeighborsSettings(FeatureSettings):
    """`selfsup eval neighbors`. Bank: `eval.train`, `data` or the run's; queries: `eval.val`, `data.val`, or the bank."""

    images: Few = 10
    """Queries, a row each."""
    k: Few = 8
    pooling: Pooling = "pooled"
    layer: Layer = -1


class AugmentationsSettings(ImageSettings):
    """`selfsup eval augmentations RECIPE|RUN`. Every key that is not one of these is one of the training."""

    images: Few = 8
    """The first ones of the run's first batch, a row each."""
    training: dict[str, Any] = Field(default_factory=dict)
    """Laid over the recipe."""


VERBS: dict[str, type[ImageSettings]] = {
    "attention": AttentionSettings,
    "pca": PcaSettings,
    "tsne": TsneSettings,
    "neighbors": NeighborsSettings,
}
