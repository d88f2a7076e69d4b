"""Multi-block masks of I-JEPA (Assran et al., 2023, "Self-Supervised Learning from Images with a Joint-Embedding Predictive
Architecture", section 3, "Targets" and "Context"): a few target blocks, and a large context block without them.

The blocks of a step have one size, drawn for the whole global batch; every image has positions of its own. Contexts are cut
to the smallest of the global batch, so that a batch is one tensor. All is drawn on the host and depends on (seed, step,
place in the global batch) alone, so that ranks and micro-batches, which each take their rows of it, agree.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from selfsup.config import Range
from selfsup.randomness import generator

_TAG = 0x3B10
ATTEMPTS = 8
"""How often positions are drawn for an image whose context is too small."""


@dataclass(frozen=True)
class MultiBlock:
    """Which blocks there are; defaults are the paper's (section 3 and appendix A)."""

    targets: int = 4
    target_scale: Range = (0.15, 0.2)
    """Area as a fraction of the patches."""
    target_ratio: Range = (0.75, 1.5)
    """Height / width."""
    context_scale: Range = (0.85, 1.0)
    """Of a square, before the targets are taken out."""
    min_context: int = 10
    """Patches below which an image's positions are drawn again."""


class Blocks(NamedTuple):
    """Indices of patches in reading order, ascending."""

    context: np.ndarray
    """int64 [B, C]."""
    targets: np.ndarray
    """int64 [B, targets, T]."""


def block_size(u: np.ndarray, scale: Range, ratio: Range, grid: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of a block: area and aspect ratio uniform in their ranges; u: two numbers in [0, 1)."""
    area = grid[0] * grid[1] * (scale[0] + float(u[0]) * (scale[1] - scale[0]))
    aspect = ratio[0] + float(u[1]) * (ratio[1] - ratio[0])
    rows, columns = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
    return min(max(rows, 1), grid[0]), min(max(columns, 1), grid[1])


def draw(kind: MultiBlock, grid: tuple[int, int], count: int, seed: int, step: int) -> Blocks:
    """The blocks of all `count` images of a global batch, on a grid of patches (rows, columns).

    An image whose context is smaller than `min_context` gets new positions, up to ATTEMPTS in all, and the best of them;
    if the targets cover everything even so, its context keeps what the targets take. Contexts are cut to equal counts by
    leaving out patches at random: the published code leaves out the last ones, which are always at the bottom. It also
    draws area and aspect ratio from one number, and never lets a block touch the last row or column; here as in the paper.
    """
    random = generator(seed, _TAG, step)
    u = random.random((2, 2))
    target = block_size(u[0], kind.target_scale, kind.target_ratio, grid)
    context = block_size(u[1], kind.context_scale, (1.0, 1.0), grid)
    places = random.random((ATTEMPTS, count, kind.targets + 1, 2))
    order = random.random((count, grid[0] * grid[1]))  # which patches stay when there are too many

    left = np.full(count, -1)  # patches in the context so far
    corners = np.zeros((count, kind.targets, 2), np.int64)
    seen = np.zeros((count, grid[0] * grid[1]), bool)  # of the context
    for attempt in places:
        small = np.flatnonzero(left < kind.min_context)
        if not len(small):
            break
        at = _corners(attempt[small, :-1], target, grid)  # [n, targets, 2]
        block = _inside(_corners(attempt[small, -1:], context, grid), context, grid)[:, 0]  # [n, patches]
        rest = block & ~_inside(at, target, grid).any(1)
        rest = np.where(rest.any(1, keepdims=True), rest, block)
        better = rest.sum(1) > left[small]
        chosen = small[better]
        left[chosen], corners[chosen], seen[chosen] = rest.sum(1)[better], at[better], rest[better]

    smallest = int(left.min())
    kept = np.argsort(np.where(seen, order, 2.0), axis=1, kind="stable")[:, :smallest]
    offsets = (np.arange(target[0])[:, None] * grid[1] + np.arange(target[1])).reshape(-1)  # [rows, columns] -> [T]
    first = corners[..., 0] * grid[1] + corners[..., 1]  # [B, targets]
    return Blocks(np.sort(kept, axis=1), first[..., None] + offsets)


def _corners(u: np.ndarray, size: tuple[int, int], grid: tuple[int, int]) -> np.ndarray:
    """Top and left [..., 2] of blocks inside the grid, every place equally likely; u: [..., 2] in [0, 1)."""
    return np.floor(u * (np.array(grid) - np.array(size) + 1)).astype(np.int64)


def _inside(corners: np.ndarray, size: tuple[int, int], grid: tuple[int, int]) -> np.ndarray:
    """bool [N, blocks, patches]: which patches a block covers."""
    lines = []
    for axis in (0, 1):
        from_corner = np.arange(grid[axis]) - corners[..., axis, None]  # [N, blocks, rows or columns]
        lines.append((from_corner >= 0) & (from_corner < size[axis]))
    covered = lines[0][..., :, None] & lines[1][..., None, :]  # [N, blocks, rows, columns]
    return covered.reshape(*covered.shape[:2], -1)
