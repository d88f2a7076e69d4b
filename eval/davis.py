"""J and F of the DAVIS challenges: region similarity and contour accuracy of masks (Perazzi et al., 2016, section 5)."""

import numpy as np

_TOLERANCE = 0.008  # of the image's diagonal


def region(found: np.ndarray, truth: np.ndarray) -> float:
    """J: intersection over union of two masks [H, W]; 1 if both are empty."""
    union = (found | truth).sum()
    return float((found & truth).sum() / union) if union else 1.0


def contour(found: np.ndarray, truth: np.ndarray) -> float:
    """F: harmonic mean of the shares of each boundary that lie within 0.008 of the diagonal (rounded up) of the other one."""
    from scipy.ndimage import distance_transform_edt

    a, b = boundary(found), boundary(truth)
    if not a.any() or not b.any():
        return float(a.any() == b.any())
    radius = np.ceil(_TOLERANCE * np.hypot(*truth.shape))
    precision = (distance_transform_edt(~b)[a] <= radius).mean()
    recall = (distance_transform_edt(~a)[b] <= radius).mean()
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def boundary(mask: np.ndarray) -> np.ndarray:
    """bool [H, W]: pixels that differ from the one to the right, below, or across; the last row and column from one of them."""
    right, below, across = mask.copy(), mask.copy(), mask.copy()
    right[:, :-1] = mask[:, 1:]
    below[:-1] = mask[1:]
    across[:-1, :-1] = mask[1:, 1:]
    edge = (mask ^ right) | (mask ^ below) | (mask ^ across)
    edge[-1] = mask[-1] ^ right[-1]
    edge[:, -1] = mask[:, -1] ^ below[:, -1]
    edge[-1, -1] = False
    return edge
