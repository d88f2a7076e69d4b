"""Weights for colour images in a network for another number of channels: only the first convolution differs."""

import sys
from typing import Any

from timm.models import adapt_input_conv
from torch import Tensor, nn


def adapt_channels(state: dict[str, Tensor], model: nn.Module, target: str) -> dict[str, Tensor]:
    """`state` with its first convolutions (timm's name of them) for as many channels as `model` takes, and a line on stderr.

    From 3 channels alone: for one they are summed, for others repeated in turn and scaled by 3 / channels, so that the sum
    over channels keeps its size (timm's `adapt_input_conv`). Anything else is left as it is.
    """
    cfg: Any = getattr(model, "pretrained_cfg", None)
    first = (cfg or {}).get("first_conv") or ()
    own, out = model.state_dict(), dict(state)
    for key in (f"{name}.weight" for name in ((first,) if isinstance(first, str) else first)):
        theirs, mine = state.get(key), own.get(key)
        if theirs is None or mine is None or theirs.ndim != 4 or mine.ndim != 4 or theirs.shape[1] != 3:
            continue
        channels = mine.shape[1]
        if channels == 3 or theirs.shape[0] != mine.shape[0] or theirs.shape[2:] != mine.shape[2:]:
            continue
        out[key] = adapt_input_conv(channels, theirs)
        how = "summed" if channels == 1 else f"repeated and scaled by 3/{channels}"
        print(f"{target}: {key} is for 3 channels: {how} for {channels}", file=sys.stderr)
    return out
