"""Which image is sample number p: a shuffle per epoch that needs no memory, and who computes which place in a batch.

The permutation is a keyed Feistel network over the smallest power of two that holds n, walked until it lands below n
(cycle-walking; Black and Rogaway, 2002, "Ciphers with arbitrary finite domains"). Every sample number can be looked up
alone, so that a resume, another number of workers or of ranks sees the same order, and 100 million images need no list.
"""

import numpy as np

from selfsup.errors import UserError
from selfsup.randomness import mix

_ROUNDS = 12
_ORDER_TAG = 0x0DE5


def hash64(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele et al., 2014) of every uint64; wraps silently."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Order:
    """Sample number 0, 1, 2, ... -> (epoch, index): each epoch visits every index of range(n) once, in its own order."""

    def __init__(self, n: int, seed: int) -> None:
        if n < 1:
            raise UserError(f"data: {n} images; at least one is needed")
        self.n = n
        bits = max(2, (n - 1).bit_length())
        self._widths = (bits // 2, bits - bits // 2)
        self._key = np.uint64(mix(seed, _ORDER_TAG))

    def at(self, p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Epochs and indices (int64, shaped like p) of sample numbers p >= 0."""
        p = np.asarray(p, dtype=np.int64)
        epochs, x = np.divmod(p.reshape(-1), self.n)
        keys = hash64(epochs.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + self._key)
        out = self._permute(x.astype(np.uint64), keys)
        outside = np.flatnonzero(out >= self.n)
        while outside.size:  # fewer than half are outside each time, on average
            out[outside] = self._permute(out[outside], keys[outside])
            outside = outside[out[outside] >= self.n]
        return epochs.reshape(p.shape), out.astype(np.int64).reshape(p.shape)

    def _permute(self, x: np.ndarray, keys: np.ndarray) -> np.ndarray:
        low, high = self._widths  # of the right and the left half; they swap each round
        right, left = x & np.uint64((1 << low) - 1), x >> np.uint64(low)
        for r in range(_ROUNDS):
            mixed = hash64(right * np.uint64(0xD1B54A32D192ED03) + keys + np.uint64(mix(r)))
            left, right = right, left ^ (mixed & np.uint64((1 << high) - 1))
            low, high = high, low
        return (left << np.uint64(low)) | right


def check_split(global_batch: int, accumulate: int, world: int) -> int:
    """Samples of one rank's micro-batch; UserError when the global batch does not split evenly."""
    if global_batch % (accumulate * world):
        parts = accumulate * world
        fits = max(parts, global_batch // parts * parts)
        raise UserError(
            f"global_batch={global_batch} does not split over {world} rank(s) x accumulate={accumulate}; "
            f"give a multiple of {parts}, such as {fits}"
        )
    return global_batch // (accumulate * world)


def step_positions(step: int, micro: int, rank: int, *, global_batch: int, accumulate: int, world: int) -> np.ndarray:
    """Positions (int64) inside the global batch that `rank` computes in micro-batch `micro`.

    They are the same at every step: contiguous within a micro-batch, ranks in order, micro-batches in order. The sample
    number of a position is `step * global_batch + position`.
    """
    size = check_split(global_batch, accumulate, world)
    return micro * (global_batch // accumulate) + rank * size + np.arange(size, dtype=np.int64)
