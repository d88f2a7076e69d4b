"""Xavier initialisation of a network's weights (Glorot & Bengio, 2010)."""

import math

import torch
from torch import Tensor, nn

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def bound(weight: Tensor, groups: int = 1, parts: int = 1) -> float:
    """sqrt(6 / (n_in + n_out)), equation 16: how many inputs a unit has, and how many units an input goes to.

    weight: [out, in / groups, *kernel]; a kernel counts once a place. parts: matrices that are stacked in it, as q, k and v.
    """
    inputs = weight[0].numel()
    outputs = weight.shape[0] // (groups * parts) * weight[0, 0].numel()
    return math.sqrt(6.0 / (inputs + outputs))


@torch.no_grad()
def xavier(model: nn.Module) -> None:
    """Weights of linear layers and convolutions uniform in +-`bound`, from torch's global generator; their biases zero.

    Norms, embeddings, tokens and layer scales keep what they have. Attention's joint `qkv` is three matrices.
    """
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Linear, *_CONVOLUTIONS)):
            continue
        groups = 1 if isinstance(module, nn.Linear) else module.groups
        parts = 3 if name.split(".")[-1] == "qkv" and module.weight.shape[0] % 3 == 0 else 1
        limit = bound(module.weight, groups, parts)
        module.weight.uniform_(-limit, limit)
        if module.bias is not None:
            module.bias.zero_()
