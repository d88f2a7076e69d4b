"""Backbones as files: a folder timm loads, and ONNX.

The folder is a pure function of the weights and of what the model is: no time, no path, no training-only option.
"""

import contextlib
import copy
import importlib.util
import io
import json
import logging
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save
from torch import Tensor, nn

from selfsup.backbones import mit
from selfsup.backbones.backbone import Backbone, Size, _pair
from selfsup.errors import UserError

# Options that act in training only: an exported backbone is the same with and without them.
_TRAINING_ONLY = {"drop_rate", "drop_path_rate", "drop_block_rate", "attn_drop_rate", "proj_drop_rate", "pos_drop_rate"}
_TRAINING_ONLY |= {"patch_drop_rate", "weight_init", "in_chans", "num_classes", "zero_init_last"}


def export_timm(backbone: Backbone, out_dir: str | Path) -> Path:
    """Write OUT/config.json and OUT/model.safetensors for `timm.create_model("local-dir:OUT", pretrained=True)`.

    The outputs are those of `backbone.model` bit for bit (weights in float32). The same weights give the same bytes.
    Returns the folder. Raises UserError if it cannot be written. What timm cannot build (see `only_here`) is written alike, and
    its config.json says that `load_backbone` alone loads it.
    """
    return write_folder(Path(out_dir), folder_config(backbone), backbone.model.state_dict(), "backbone")


def only_here(options: Mapping[str, Any]) -> str:
    """Why bare timm cannot build a backbone of these options; '' if it can."""
    return "timm has no deformable convolution" if "deformable" in options else ""


def write_folder(out: Path, config: Mapping[str, Any], state: Mapping[str, Tensor], what: str) -> Path:
    """OUT/config.json and OUT/model.safetensors, the same bytes for the same values. UserError if they cannot be written."""
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    plain = {k: _plain(v) for k, v in sorted(state.items())}
    try:
        out.mkdir(parents=True, exist_ok=True)
        _write(out / "model.safetensors", save(plain, metadata={"format": "pt"}))
        _write(out / "config.json", text.encode())
    except OSError as error:
        raise UserError(
            f"{out}: the {what} cannot be written: {error.strerror or error}; choose another folder"
        ) from None
    return out


def timm_difference(backbone: Backbone, out_dir: str | Path, size: Size | None = None) -> float:
    """Largest absolute difference between bare timm's model of OUT and `backbone` on noise; 0.0 is expected.

    Raises UserError where bare timm cannot load it.
    """
    if why := only_here(backbone.options):
        raise UserError(f"{out_dir}: bare timm cannot load it: {why}; use selfsup.load_backbone")
    with torch.random.fork_rng(devices=[]):
        bare = timm.create_model(f"local-dir:{out_dir}", pretrained=True).eval()
    images = noise(backbone, size, batch=2)
    with torch.no_grad(), evaluating(backbone):
        return float((bare(images) - _on_cpu(backbone)(images).pooled).abs().max())


def export_onnx(backbone: Backbone, path: str | Path, size: Size | None = None) -> float:
    """Write an ONNX model: images [batch, C, H, W] -> pooled [batch, D], patches [batch, D, h, w]; batch is free.

    size: pixels, default `backbone.image_size`. Returns the largest absolute difference to `backbone` that ONNX
    Runtime shows on noise. Raises UserError if the extra is not installed or the file cannot be written.
    """
    if backbone.sees != "volumes":
        backbone.check_size(_pair(size or backbone.image_size))
    with evaluating(backbone):
        module = _Outputs(_on_cpu(backbone)).eval()
        images = noise(backbone, size, batch=2), noise(backbone, size, batch=3)
        return onnx_of(module, images, Path(path), ("pooled", "patches"))


def onnx_of(module: nn.Module, images: tuple[Tensor, Tensor], path: Path, outputs: tuple[str, ...]) -> float:
    """Write `module` in eval mode as ONNX, images [batch, ...] -> `outputs`: traced on the first batch, tried on the second.

    Both on the CPU, and of different lengths. Returns and raises as `export_onnx`.
    """
    absent = [n for n in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(n) is None]
    if absent:
        raise UserError(f"--format onnx needs {', '.join(absent)}: pip install 'selfsup[onnx]'")
    if path.suffix != ".onnx":
        raise UserError(f"{path}: an ONNX file ends in .onnx")
    _to_onnx(module, images[0], path, outputs)
    return _onnx_difference(module, images[1], path)


class _Outputs(nn.Module):
    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.backbone(images)
        return features.pooled, features.patches


def _to_onnx(module: nn.Module, images: Tensor, path: Path, outputs: tuple[str, ...]) -> None:
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with torch.no_grad(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            torch.onnx.export(
                module,
                (images,),
                str(path),
                input_names=["images"],
                output_names=list(outputs),
                dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1)}},
                dynamo=True,
                external_data=False,
                verbose=False,
            )
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None


def _onnx_difference(module: nn.Module, images: Tensor, path: Path) -> float:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = session.run(None, {"images": images.numpy()})
    with torch.no_grad():
        expected = module(images)
    expected = (expected,) if isinstance(expected, Tensor) else expected
    return max(float((torch.from_numpy(f) - e).abs().max()) for f, e in zip(found, expected, strict=True))


def folder_config(backbone: Backbone, classes: int = 0) -> dict[str, Any]:
    """The contents of config.json, in timm's format, with one section of ours; classes: of the classifier, 0 for none."""
    source = backbone.model.pretrained_cfg
    flexible = backbone.options.get("dynamic_img_size") or backbone.options.get("strict_img_size") is False
    size = list(backbone.image_size)
    args = {k: v for k, v in backbone.options.items() if k not in _TRAINING_ONLY and v is not None}
    args["in_chans"] = backbone.in_chans
    config: dict[str, Any] = {
        "architecture": mit.resolve(backbone.name, {})[0].partition(".")[0],
        "num_classes": classes,
        "num_features": backbone.embed_dim,
        "model_args": args,
        "pretrained_cfg": {
            "input_size": [backbone.in_chans, *size],
            "fixed_input_size": bool(source.get("fixed_input_size")) and not flexible,  # type: ignore[union-attr,operator]
            "interpolation": "bicubic",
            "crop_pct": 0.875,
            "mean": list(backbone.mean),
            "std": list(backbone.std),
            "num_classes": classes,
            "pool_size": None,
            "first_conv": source.get("first_conv"),  # type: ignore[union-attr,operator]
            "classifier": source.get("classifier"),  # type: ignore[union-attr,operator]
        },
        "selfsup": {"pos_interp": backbone.pos_interp},
    }
    if why := only_here(args):
        config["selfsup"]["loads_with"] = f"selfsup.load_backbone alone: {why}"
    if what := unknown_to_timm(backbone):
        config["selfsup"]["note"] = f"{what}, which bare timm does not know: selfsup.load_backbone reads this folder"
    try:
        return json.loads(json.dumps(config))
    except TypeError as error:
        raise UserError(f"backbone: an option cannot be written to config.json ({error}); use plain values") from None


def _plain(tensor: Tensor) -> Tensor:
    """On the CPU, float32 where floating, contiguous, with memory of its own."""
    tensor = tensor.detach().to("cpu", torch.float32 if tensor.is_floating_point() else tensor.dtype)
    return tensor.clone(memory_format=torch.contiguous_format)


def _write(path: Path, data: bytes) -> None:
    """All or nothing, under the final name only when complete."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def noise(backbone: Backbone, size: Size | None, batch: int) -> Tensor:
    """Images [batch, C, h, w] of normal noise, always the same; size: default `backbone.image_size`.

    For a backbone of clips [batch, T*C, h, w], of volumes [batch, C, D, h, w], with the T or the size that it was built for.
    """
    shape = (batch, *backbone.input_shape(size))
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def unknown_to_timm(backbone: Backbone) -> str:
    """What a backbone is that timm has no model for; '' of all others."""
    return "" if backbone.sees == "images" else f"a model of {backbone.sees}"


def _on_cpu(backbone: Backbone) -> Backbone:
    """The backbone itself, or a float32 copy on the CPU."""
    like = next(backbone.parameters())
    if like.device.type == "cpu" and like.dtype == torch.float32:
        return backbone
    return copy.deepcopy(backbone).to("cpu", torch.float32)


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Any:
    """A context in which `module` is in eval mode."""
    modes = {m: m.training for m in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for m, mode in modes.items():
            m.training = mode
