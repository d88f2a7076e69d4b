"""Keys of further figures on frozen features: fewshot, retrieval, duplicates, robustness, layers."""

from typing import Annotated, Literal

from pydantic import Field

from selfsup.config import Positive

from .many import Many
from .settings import FeatureSettings, ImageSettings, KnnSettings, Layer, LinearSettings, Pooling
from .settings_pictures import Few


class LabelledSettings(FeatureSettings):
    """Of evaluations that compare one kind of features of labelled images."""

    pooling: Pooling = "pooled"
    layer: Layer = -1


class FewshotSettings(LabelledSettings):
    """`selfsup eval fewshot`."""

    shots: Annotated[tuple[Positive, ...], Many, Field(min_length=1)] = (1, 5, 10)
    """Labelled images of each class."""
    repeats: Annotated[int, Field(ge=2, le=10_000)] = 50
    """Seeded choices of them."""


class RetrievalSettings(LabelledSettings):
    """`selfsup eval retrieval`. The val images are the queries, the training images what is searched."""


class DuplicatesSettings(FeatureSettings):
    """`selfsup eval duplicates`. Images: `data`, or those the run was trained on; labels are not needed."""

    threshold: Annotated[float, Field(gt=0, le=1)] = 0.97
    """Cosine from which two images are a pair."""
    k: Positive = 20
    """At most so many partners of an image are looked at."""
    images: Few = 12
    """Pairs shown in the picture."""
    pooling: Pooling = "pooled"
    layer: Layer = -1


class RobustnessSettings(KnnSettings):
    """`selfsup eval robustness`: corrupted val images, by k-NN among clean training images or by the run's classifier."""

    by: Literal["knn", "classifier"] = "knn"
    """classifier: of a run that was trained with labels; calibration is measured as well. The keys of k-NN then mean nothing."""
    bins: Positive = 15
    """Of the calibration error, of equal width."""
    k: Annotated[tuple[Positive, ...], Many, Field(min_length=1, max_length=1)] = (20,)
    temperature: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Many, Field(min_length=1, max_length=1)] = (0.07,)
    corruptions: Annotated[tuple[str, ...], Many, Field(min_length=1)] | None = None
    """Names; default: all of them."""


VERBS: dict[str, type[ImageSettings]] = {
    "fewshot": FewshotSettings,
    "retrieval": RetrievalSettings,
    "duplicates": DuplicatesSettings,
    "robustness": RobustnessSettings,
    "layers": LinearSettings,
}
