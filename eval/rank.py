"""How many dimensions features use: a figure of their quality that needs no labels."""

import numpy as np
import torch

_MOST = 25_600
_EPS = 1e-7


def rankme(features: np.ndarray, most: int = _MOST) -> float:
    """exp of the entropy of the singular values (Garrido et al., 2023, "RankMe", equations 1 and 2); from 1 to min(N, D).

    features: float [N, D], not centred; of more than `most` rows as many at even distances (their section 4 has 25,600
    suffice). The singular values are roots of eigenvalues of Z^T Z in float64: those below 1e-8 of the largest are lost, which
    the paper's epsilon of 1e-7 hides.
    """
    rows = features if len(features) <= most else features[np.linspace(0, len(features) - 1, most).astype(np.int64)]
    z = torch.from_numpy(np.ascontiguousarray(rows)).double()
    gram = z.T @ z if z.shape[1] <= z.shape[0] else z @ z.T
    values = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    if values.sum() == 0:
        return 1.0
    p = values / values.sum() + _EPS
    return float(torch.exp(-(p * p.log()).sum()))
