"""A seeded, stratified split of labelled data."""

import numpy as np

from selfsup.errors import UserError
from selfsup.randomness import generator

_TAG = 0x5911


def split(labels: np.ndarray, fraction: float = 0.2, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Indices (train, val), ascending int64, with `fraction` of every class in val.

    labels: int64 [N], -1 where unlabelled: those are in neither part. A class of two or more images has at least one
    in each part; a class of one is in train. Depends on labels, fraction and seed alone.
    """
    if not 0 < fraction < 1:
        raise UserError(f"split fraction={fraction}; give a number between 0 and 1, such as 0.2")
    labels = np.asarray(labels)
    val: list[np.ndarray] = []
    for label in np.unique(labels[labels >= 0]):
        members = np.flatnonzero(labels == label)
        count = min(max(round(len(members) * fraction), 1), len(members) - 1)  # 0 for a class of one
        val.append(generator(seed, _TAG, int(label)).permutation(members)[:count])
    chosen = np.zeros(len(labels), dtype=bool)
    if val:
        chosen[np.concatenate(val)] = True
    if not chosen.any():
        raise UserError(
            f"data: {len(labels)} images with {len(val)} classes cannot be split; a class needs two images or more"
        )
    return np.flatnonzero(~chosen & (labels >= 0)), np.flatnonzero(chosen)
