"""The main object of an image from its patch features alone: TokenCut, LOST, and the mass of attention."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from selfsup.errors import UserError

_MOST = 4096  # patches: the eigenvectors of so many take a minute
_EPSILON = 1e-5


def tokencut(features: Tensor, tau: float = 0.2) -> Tensor:
    """bool [h, w]: normalised cut of the graph of patches (Wang et al., 2022, "TokenCut", section 3.2).

    features: [h, w, D]. Patches of cosine tau or more are joined by an edge of 1, others by 1e-5. The second smallest
    generalised eigenvector of (D - E) y = lambda D y is cut at its mean; the object is the side with the largest |y|, of it
    the connected piece that holds this largest entry.
    """
    h, w, _ = features.shape
    if h * w > _MOST:
        raise UserError(
            f"size: {h} x {w} patches are more than the {_MOST} of which a cut is computed; give a smaller size"
        )
    x = F.normalize(features.flatten(0, 1).double(), dim=1)  # [N, D]
    edges = torch.where(x @ x.T >= tau, 1.0, _EPSILON).double()
    scale = edges.sum(dim=1).rsqrt()
    # D^-1/2 E D^-1/2 has the eigenvalues 1 - lambda and the eigenvectors D^1/2 y
    _, vectors = torch.linalg.eigh(scale[:, None] * edges * scale)
    y = vectors[:, -2] * scale
    seed = int(y.abs().argmax())
    side = y > y.mean()
    return connected((side if side[seed] else ~side).view(h, w), seed)


def lost(features: Tensor, k: int = 100) -> Tensor:
    """bool [h, w]: seed expansion (Simeoni et al., 2021, "LOST", section 3). features: [h, w, D], not centred or scaled.

    The degree of a patch is the number of patches with which its inner product is not negative; the seed is that of least
    degree, and grows by those of the k next that agree with it. The object are the patches that agree with the sum of these, of
    them the connected piece that holds the seed. k is at most half of all patches.
    """
    h, w, _ = features.shape
    x = features.flatten(0, 1).double()
    products = x @ x.T  # [N, N]
    order = (products >= 0).sum(dim=1).argsort(stable=True)
    seed = int(order[0])
    near = order[: max(1, min(k, h * w // 2))]
    near = near[products[near, seed] >= 0]
    mask = products[:, near].sum(dim=1) >= 0
    mask[seed] = True
    return connected(mask.view(h, w), seed)


def by_mass(attention: Tensor, mass: float = 0.6) -> Tensor:
    """bool [h, w]: the fewest cells that hold a share of the attention [h, w] (Caron et al., 2021, figure 4)."""
    values, order = attention.flatten().double().sort(descending=True, stable=True)
    before = values.cumsum(0) - values
    out = torch.zeros(attention.numel(), dtype=torch.bool)
    out[order[before < mass * values.sum()]] = True
    return out.view(attention.shape)


def connected(mask: Tensor, seed: int) -> Tensor:
    """The piece of a mask [h, w], joined by sides, that holds the cell `seed` (row * w + column)."""
    from scipy.ndimage import label

    pieces, _ = label(mask.numpy())
    return torch.from_numpy(pieces == pieces.flat[seed]) & mask


def box_of(mask: np.ndarray) -> tuple[int, int, int, int] | None:
    """(top, left, bottom, right), the last two beyond it, of the largest piece of a mask [H, W]; None for an empty one."""
    from scipy.ndimage import find_objects, label

    pieces, count = label(mask)
    if count == 0:
        return None
    largest = np.bincount(pieces.ravel())[1:].argmax()
    rows, columns = find_objects(pieces)[largest]
    return rows.start, columns.start, rows.stop, columns.stop


def box_iou(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> float:
    """Intersection over union of two boxes (top, left, bottom, right)."""
    height, width = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(height, 0) * max(width, 0)
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)
