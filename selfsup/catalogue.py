"""`selfsup backbones`: what can be trained, how large it is, and by which methods. Nets are built on torch's meta device.

GFLOPs are those of papers on backbones: a multiply-add counts as one, of matrix products and convolutions, for one image. Whether
a method takes a backbone is asked of the method (`suits`, see `methods.contract`), which asks the same when it is trained.
"""

import fnmatch
import json
import math
import sys
import time
from typing import Any

import torch
from timm.models import is_model, list_models
from torch.utils.flop_counter import FlopCounterMode

from selfsup import methods
from selfsup.backbones import Backbone, mit
from selfsup.backbones.create import build, wrap
from selfsup.errors import UserError
from selfsup.log import duration
from selfsup.wording import one_line

FAMILIES: dict[str, list[str]] = {
    "ViT, DeiT": ["vit_small_patch16_224", "vit_base_patch16_224", "deit_tiny_distilled_patch16_224"],
    "ViT with registers": ["vit_small_patch14_reg4_dinov2"],
    "ViT, mean pooling": ["vit_base_patch16_gap_224"],
    "ViT, attention pooling (MAP)": ["vit_base_patch16_siglip_224"],
    "Swin": ["swin_tiny_patch4_window7_224"],
    "PVT v1's attention (Twins-PCPVT)": ["twins_pcpvt_small"],
    "PVT v2": ["pvt_v2_b0", "pvt_v2_b2_li"],
    "SegFormer's MiT": ["mit_b0", "mit_b2"],
    "XCiT": ["xcit_small_12_p16_224"],
    "MViT v2": ["mvitv2_tiny"],
    "ConvMixer": ["convmixer_768_32"],
    "MLP-Mixer": ["mixer_b16_224"],
    "ResNet (B)": ["resnet18", "resnet50"],
    "ResNet C, D": ["resnet50c", "resnet50d"],
    "SE-ResNet": ["seresnet50"],
    "ResNet, deformable": ["resnet50 backbone.deformable=[3,4]"],
    "ConvNeXt": ["convnext_tiny"],
    "EfficientNet": ["efficientnet_b0"],
}
"""What is listed without a pattern: members of every family that the documents name."""
OURS = ("timesformer", "vit3d")
"""Beginnings of names that timm knows only where this package is imported: nets of clips and of volumes."""

ONE_SIZE = (
    "one size: give local views that of the global ones (views.local.size), or leave them out (views.local.count=0)"
)
_FOREIGN = (
    "of torchvision, which gives no maps: no backbone, but a teacher (teacher=package.module:function returns the net)"
)


def run(pattern: str | None, *, size: int, as_json: bool, names: bool) -> None:
    """Print the table, a JSON list, or names alone. Raises UserError for a pattern that nothing matches."""
    found = wanted(pattern)
    if names:
        print("\n".join(name for _, name in found))
        return
    rows, began = [], time.monotonic()
    for i, (family, name) in enumerate(found):
        rows.append(foreign(name, size) if family == "torchvision" else describe(name, size, family))
        spent = time.monotonic() - began
        if spent > 5 and (i % 10 == 9 or i + 1 == len(found)):
            left = spent / (i + 1) * (len(found) - i - 1)
            print(f"{i + 1}/{len(found)} backbones  eta {duration(left)}", file=sys.stderr)
    print(json.dumps(rows, indent=2) if as_json else table(rows, size))


def wanted(pattern: str | None) -> list[tuple[str, str]]:
    """(family or library, name) of what is listed: FAMILIES, or every name that holds the pattern; * and ? are a shell's."""
    if pattern is None:
        return [(family, name) for family, members in FAMILIES.items() for name in members]
    import torchvision

    glob = pattern if any(c in pattern for c in "*?[") else f"*{pattern}*"
    theirs = [n for n in torchvision.models.list_models(module=torchvision.models) if not is_model(n)]
    ours = [n for n in list_models() if n.startswith(OURS)]
    known = (
        [("selfsup", n) for n in [*mit.MIT, *ours]]
        + [("timm", n) for n in list_models() if n not in ours]
        + [("torchvision", n) for n in theirs]
    )
    found = [(source, name) for source, name in known if fnmatch.fnmatchcase(name, glob)]
    if not found:
        raise UserError(
            f"no backbone matches {one_line(pattern)!r}; give a part of a name, as in `selfsup backbones swin`"
        )
    return found


def describe(name: str, size: int, family: str = "") -> dict[str, Any]:
    """One backbone at `size` pixels: parameters, cost, shape, and for each method None or why it does not take it.

    name: one a recipe may give, options of ours behind it. A backbone that refuses the size has "refused" instead.
    """
    row: dict[str, Any] = {"name": name, "family": family, "size": size}
    try:
        backbone = _built(name, size)
        flops, grid = _counted(backbone, size)
    except UserError as why:
        return {**row, "refused": str(why)}
    info: Any = getattr(backbone.model, "feature_info", None) or []
    return row | {
        "parameters": sum(p.numel() for p in backbone.model.parameters()),
        "gflops": round(flops / 2e9, 3),
        "embed_dim": backbone.embed_dim,
        "tokens": list(grid),
        "prefix_tokens": int(getattr(backbone.model, "num_prefix_tokens", 0) or 0),
        "strides": sorted({int(level["reduction"]) for level in info}) or [backbone.stride],
        "one_size": backbone.fixed_size,
        "methods": {method: fits(method, backbone) for method in methods.METHODS},
    }


def fits(method: str, backbone: Backbone) -> str | None:
    """Why a method does not take this backbone; None if it does."""
    try:
        judge = getattr(methods.find(method), "suits", None)
        if judge is not None:
            judge(backbone)
    except UserError as why:
        return str(why)
    return None


def foreign(name: str, size: int) -> dict[str, Any]:
    """The row of a net that torchvision alone has."""
    import torchvision

    kwargs = {"init_weights": False} if name == "googlenet" else {}
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None, **kwargs).eval()
        images = torch.zeros(1, 3, size, size)
    with _counter() as counter:
        model(images)
    flops = counter.get_total_flops()
    parameters = sum(p.numel() for p in model.parameters())
    row = {
        "name": name,
        "family": "torchvision",
        "size": size,
        "parameters": parameters,
        "gflops": round(flops / 2e9, 3),
    }
    return row | {"refused": _FOREIGN}


def _built(name: str, size: int) -> Backbone:
    name, _, rest = name.partition(" ")
    given = dict(part.removeprefix("backbone.").split("=", 1) for part in rest.split())
    options: dict[str, Any] = {key: json.loads(value) for key, value in given.items()}
    with torch.device("meta"):
        model, options = build(name, options, input_size=size)
    norm = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    return wrap(model.eval(), name, options, input_size=size, pos_interp="timm", **norm)


def _counted(backbone: Backbone, size: int) -> tuple[float, tuple[int, ...]]:
    """(floating-point operations of one image, axes of the last map); of a clip of the frames, of a volume of the size that it
    is built for."""
    with torch.device("meta"):
        images = torch.zeros(1, *backbone.input_shape(size))
    try:
        with _counter() as counter:
            grid = backbone(images).patches.shape[2:]
    except Exception as error:
        backbone.check_size(size)  # says why, if the size is
        raise UserError(
            f"cannot be run on one image of {size} pixels: {type(error).__name__}: {one_line(error)}"
        ) from None
    return float(counter.get_total_flops()), tuple(map(int, grid))


def _counter() -> FlopCounterMode:
    """Use it with gradients: without them torch 2.15's fails on blocks that are called with views (CaiT)."""
    import torchvision

    del torchvision  # its operators are known from here on
    return FlopCounterMode(display=False, custom_mapping={torch.ops.torchvision.deform_conv2d: _of_deformable})


def _of_deformable(x: Any, weight: Any, *rest: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """As a convolution; its sampling is not a product of matrices, and counts no more than pooling does."""
    return 2 * math.prod(out_shape) * math.prod(weight[1:])


def table(rows: list[dict[str, Any]], size: int) -> str:
    """The rows as text, and why methods do not take some of them."""
    width = max(len(row["name"]) for row in rows)
    lines = [f"{'backbone':{width}} {'params M':>9} {'GFLOPs':>8} {'D':>5}  {'map':9} {'strides':22} methods"]
    examples: dict[str, str] = {}
    family = None
    for row in rows:
        if row["family"] != family:
            family = row["family"]
            lines.append(f"{family}:")
        cost = f"{row['parameters'] / 1e6:9.2f} {row['gflops']:8.2f}" if "parameters" in row else " " * 18
        if "refused" in row:
            lines.append(f"{row['name']:{width}} {cost} {row['refused']}")
            continue
        refusing = {method: why for method, why in row["methods"].items() if why}
        for method, why in refusing.items():
            examples.setdefault(method, why)
        grid, strides = "x".join(map(str, row["tokens"])), " ".join(map(str, row["strides"]))
        grid += f"+{row['prefix_tokens']}" if row["prefix_tokens"] else ""
        fit = f"all but {', '.join(refusing)}" if refusing else "all"
        one = "; one size" if row["one_size"] else ""
        lines.append(f"{row['name']:{width}} {cost} {row['embed_dim']:5}  {grid:9} {strides:22} {fit}{one}")
    lines += [
        "",
        f"of one image of {size} pixels; a multiply-add counts as one; the map is the last one's, + tokens before it",
    ]
    if any(row.get("one_size") for row in rows):
        lines.append(ONE_SIZE)
    lines += [f"{method}: {why}" for method, why in examples.items()]
    return "\n".join(lines)
