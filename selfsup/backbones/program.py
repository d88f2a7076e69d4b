"""A backbone as a program of `torch.export`: one file that runs without this package and without timm."""

import contextlib
import os
from pathlib import Path

import torch

from selfsup.backbones.backbone import Backbone, Size, _pair
from selfsup.backbones.export import _on_cpu, _Outputs, evaluating, noise
from selfsup.errors import UserError


def export_program(backbone: Backbone, path: str | Path, size: Size | None = None) -> float:
    """Write a .pt2 file: images [batch, C, H, W] -> pooled [batch, D], patches [batch, D, h, w]; batch is free, float32, CPU.

    size: pixels, default `backbone.image_size`. `torch.export.load(path).module()(images)` runs it; as that reads pickles,
    load none from strangers. Returns the largest absolute difference to `backbone` on noise, in a batch of another length
    than the one it was traced with. Raises UserError if the file cannot be written.
    """
    path = Path(path)
    if path.suffix != ".pt2":
        raise UserError(f"{path}: a program of torch.export ends in .pt2")
    if len(backbone.patch_shape) == 2:
        backbone.check_size(_pair(size or backbone.image_size))
    with evaluating(backbone), torch.no_grad():
        module = _Outputs(_on_cpu(backbone)).eval()
        shapes = {"images": {0: torch.export.Dim("batch", min=1)}}
        program = torch.export.export(module, (noise(backbone, size, batch=2),), dynamic_shapes=shapes)
        images = noise(backbone, size, batch=3)
        found, expected = program.module()(images), module(images)
    temporary = path.with_name(f".{path.stem}.tmp.pt2")  # torch warns of another suffix
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.export.save(program, temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # RuntimeError: torch's own writer
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written: {error}") from None
    return max(float((f - e).abs().max()) for f, e in zip(found, expected, strict=True))
