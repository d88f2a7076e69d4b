"""k-NN as its documentation says it, in float64, query by query: nothing shared with selfsup.eval."""

import numpy as np


def nearest(bank: np.ndarray, query: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(cosines, rows) of the k nearest: cosines rounded to 2^-32, equal ones by lower row."""
    bank, query = bank.astype(np.float64), query.astype(np.float64)
    lengths = np.sqrt((bank**2).sum(axis=1)) * np.sqrt((query**2).sum())
    cosine = (bank * query).sum(axis=1) / np.where(lengths > 0, lengths, 1.0)
    cosine = np.round(cosine * 2.0**32) / 2.0**32
    rows = sorted(range(len(bank)), key=lambda i: (-cosine[i], i))[:k]
    return cosine[rows], np.array(rows)


def predict(bank: np.ndarray, labels: np.ndarray, query: np.ndarray, k: int, temperature: float) -> list[int]:
    """Classes that got a vote, best first; equal votes (to 2^-30 of the largest) by lower class."""
    cosines, rows = nearest(bank, query, k)
    votes: dict[int, float] = {}
    for cosine, row in zip(cosines, rows):
        votes[int(labels[row])] = votes.get(int(labels[row]), 0.0) + float(np.exp(cosine / temperature))
    top = max(votes.values())
    return sorted(votes, key=lambda c: (-round(votes[c] / top * 2.0**30), c))
