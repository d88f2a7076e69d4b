"""Features of labelled training and val images, as the evaluations need them that only compare these."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import results
from .datasets import LabelledPair, labelled_only, open_pair
from .features import FeatureFile, extract, transform_for
from .poolings import Request
from .settings_scores import LabelledSettings
from .targets import Target, open_target


@dataclass(frozen=True)
class LabelledFeatures:
    """What one pooling of one layer gives for both parts."""

    target: Target
    request: Request
    pair: LabelledPair
    train: FeatureFile
    val: FeatureFile
    unlabelled: Any
    """What `labelled_only` left out."""

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(training features [N, D], their labels [N], val features [M, D], their labels [M]) of readable images."""
        train, val = self.train.readable(self.request), self.val.readable(self.request)
        bank, queries = np.asarray(self.train.array(self.request)), np.asarray(self.val.array(self.request))
        return bank[train], self.pair.train_labels[train], queries[val], self.pair.val_labels[val]

    def protocol(self, seed: int) -> dict[str, Any]:
        """How the features came about, and of which images."""
        left = {"train": self.train, "val": self.val}
        return {
            "pooling": self.request.pooling,
            "layer": self.request.layer,
            "unlabelled_left_out": self.unlabelled,
            "unreadable_left_out": {name: int((~file.readable(self.request)).sum()) for name, file in left.items()},
            **self.train.protocol,
            **self.pair.protocol,
            "seed": seed,
            "versions": results.versions(),
        }


def labelled_features(
    target: str, settings: LabelledSettings, out: Path | None, names: tuple[str, str] = ("train", "val")
) -> LabelledFeatures:
    """Open a target and its images and extract; every rank calls it. names: what progress calls the two parts.

    Raises UserError for a target, images, or a result file `out` that will not do, before any work.
    """
    results.check_destination(out)
    opened = open_target(target, device=settings.device)
    pair, left_out = labelled_only(open_pair(opened, settings))
    request = Request(settings.pooling, settings.layer)
    transform = transform_for(opened, pair.train, settings)
    train, val = (
        extract(opened, images, settings, [request], transform, what=f"{name} features")
        for name, images in zip(names, (pair.train, pair.val))
    )
    return LabelledFeatures(opened, request, pair, train, val, left_out)
