"""Writes golden_features.npz: 600 bank and 120 query features with clusters, exact duplicates, scaled copies and zeros.

python tests/eval/make_golden.py
"""

from pathlib import Path

import numpy as np


def make() -> dict[str, np.ndarray]:
    """bank [600, 24] and queries [120, 24] float32, labels in 0..11, class 11 in the queries only."""
    rng = np.random.Generator(np.random.PCG64(20))
    centres = rng.normal(size=(11, 24))
    bank_labels = rng.integers(0, 11, 600)
    bank = centres[bank_labels] + 1.2 * rng.normal(size=(600, 24))
    labels = rng.integers(0, 12, 120)
    queries = centres[labels % 11] + 1.2 * rng.normal(size=(120, 24))
    bank, queries = np.round(bank * 8) / 8, np.round(queries * 8) / 8  # exact in float32
    bank[300:420] = bank[:120]  # duplicates, most of them with another label
    bank[420:450] = bank[:30] * 2  # the same direction
    bank[450:456] = 0
    bank[500:560] = bank[500]  # sixty equal images: a tie at the edge of every k
    bank_labels[500:560] = np.arange(60) % 11
    queries[:40] = bank[:40]  # with their duplicates in the bank
    queries[40:44] = 0
    queries[44:60] = bank[500] + np.round(rng.normal(size=(16, 24))) / 8
    return {
        "bank": bank.astype(np.float32),
        "bank_labels": bank_labels.astype(np.int64),
        "queries": queries.astype(np.float32),
        "labels": labels.astype(np.int64),
    }


if __name__ == "__main__":
    np.savez_compressed(Path(__file__).with_name("golden_features.npz"), **make())
