"""Exits of a network: classifiers on the maps between its stages, each usable alone without the stages behind it.

An exit alone can be written as a folder, config.json and model.safetensors, that holds the stages before it and nothing
behind them, and loaded again: `export_exit`, `load_exit`; or as ONNX.
"""

import copy
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from safetensors.torch import load_file
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from selfsup.backbones import Backbone
from selfsup.backbones.export import folder_config, noise, onnx_of, write_folder
from selfsup.backbones.load import rebuild
from selfsup.backbones.stages import cut_after, map_after, map_shapes
from selfsup.classifier import Classifier, NotAsTimm, export_classifier, has_classifier, load_classifier
from selfsup.config import Positive, Section, suggest, validate
from selfsup.errors import UserError
from selfsup.wording import one_line

Norm = Literal["batch", "layer"]


class ExitShape(Section):
    """What an `Exit` is built from."""

    in_dim: Positive
    """Channels of the map."""
    dim: Positive
    """Of the feature: as the backbone's own, so that they can be compared."""
    classes: Positive
    width: Positive
    """Channels inside the bottleneck."""
    strides: Annotated[int, Field(ge=0, le=16)]
    """Convolutions of stride 2: the map comes to the size of the deepest one."""
    norm: Norm


class Exit(nn.Module):
    """Bottleneck and linear classifier (Zhang et al., 2019, figure 2).

    The bottleneck is 1x1 to `width` channels; 3x3 of stride 2, as often as the map is twice as large as the deepest one; and
    1x1 to `dim` channels, which is done after the mean over the map: the same, and cheaper. The paper does not say what its
    convolutions are. Here the 3x3 ones are depthwise, with 1x1 behind them: dense ones cost more than the stages that an
    exit of a small net spares. On tokens, whose map is as large as the deepest, this is an MLP with a mean inside.
    """

    def __init__(self, shape: ExitShape) -> None:
        super().__init__()
        self.shape = shape
        norm: type[nn.Module] = nn.BatchNorm2d if shape.norm == "batch" else LayerNorm2d
        parts: list[nn.Module] = [nn.Conv2d(shape.in_dim, shape.width, 1, bias=False), norm(shape.width), nn.ReLU()]
        for _ in range(shape.strides):
            parts += [
                nn.Conv2d(shape.width, shape.width, 3, stride=2, padding=1, groups=shape.width, bias=False),
                nn.Conv2d(shape.width, shape.width, 1, bias=False),
                norm(shape.width),
                nn.ReLU(),
            ]
        self.reduce = nn.Sequential(*parts)
        self.expand = nn.Linear(shape.width, shape.dim)
        self.classifier = nn.Linear(shape.dim, shape.classes)

    def forward(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """[B, in_dim, h, w] -> (feature [B, dim], logits [B, classes])."""
        feature = self.expand(self.reduce(maps).mean(dim=(2, 3)))
        return feature, self.classifier(feature)


def exits_for(
    backbone: Backbone, layers: list[int], classes: int, width: int | None = None, norm: Norm | None = None
) -> list[Exit]:
    """An exit after each of these layers.

    width: default a quarter of the deepest feature's. norm: default batch where the backbone has batch norm, else layer.
    """
    (_, height, _), shapes = map_shapes(backbone, layers)
    batch = any(isinstance(m, _BatchNorm) for m in backbone.modules())
    return [
        Exit(
            ExitShape(
                in_dim=channels,
                dim=backbone.embed_dim,
                classes=classes,
                width=width or max(backbone.embed_dim // 4, 1),
                strides=max(round(math.log2(h / height)), 0),
                norm=norm or ("batch" if batch else "layer"),
            )
        )
        for channels, h, _ in shapes
    ]


class ExitNetwork(nn.Module):
    """A backbone with its head, the deepest exit, and with exits after some of its layers."""

    def __init__(self, backbone: Backbone, head: nn.Module, exits: list[Exit], layers: list[int]) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.exits = nn.ModuleDict({f"exit{i + 1}": part for i, part in enumerate(exits)})
        self.layers = layers

    def forward(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """[B, C, H, W] -> features [B, D] and logits [B, classes] of every exit, the deepest last, in one pass."""
        whole, maps = self.backbone.forward_stages(images, self.layers)
        found = [part(m) for part, m in zip(self.exits.values(), maps, strict=True)]
        found.append((whole.pooled, self.head(whole.pooled)))
        return [feature for feature, _ in found], [logits for _, logits in found]

    def classifiers(self) -> dict[str, nn.Module]:
        """Every exit alone, the deepest first, and all of them as an ensemble; they share weights with this network."""
        out: dict[str, nn.Module] = {f"exit{len(self.layers) + 1}": Classifier(self.backbone, self.head)}
        for (name, part), layer in zip(self.exits.items(), self.layers, strict=True):
            out[name] = ExitClassifier(self.backbone, layer, part)  # type: ignore[arg-type]
        return out | {"ensemble": Ensemble(self)}


class ExitClassifier(nn.Module):
    """One exit alone: normalised images [B, C, H, W] -> logits [B, classes]. Layers behind `layer` are not computed."""

    def __init__(self, backbone: Backbone, layer: int, exit: Exit) -> None:
        super().__init__()
        self.backbone = backbone
        self.layer = layer
        self.exit = exit

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        return self.exit(map_after(self.backbone, images, self.layer))[1]

    def cut(self) -> "ExitClassifier":
        """A copy, in eval mode on the CPU, that has no layers behind the exit; its logits are the same."""
        return ExitClassifier(cut_after(_copy(self.backbone), self.layer), self.layer, _copy(self.exit)).eval()


class Ensemble(nn.Module):
    """All exits together: the logarithm of the mean of their probabilities, as logits."""

    def __init__(self, network: ExitNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, classes]."""
        found = torch.stack([z.log_softmax(dim=-1) for z in self.network(images)[1]])  # [exits, B, classes]
        return found.logsumexp(dim=0) - math.log(len(found))


# -------------------------------------------------------------------------------------------------------------- files


class ExitFile(Section):
    """config.json of an exported exit."""

    name: str
    layer: Annotated[int, Field(ge=0)]
    """Of the backbone: the exit reads the map after it."""
    exit: ExitShape
    backbone: dict[str, Any]
    """The whole backbone, as in its own config.json; the weights are of its layers up to `layer`."""
    label_names: tuple[str, ...] | None = None


def export_exit(
    classifier: ExitClassifier, name: str, out: str | Path, label_names: Sequence[str] | None = None
) -> Path:
    """Write OUT/config.json and OUT/model.safetensors: the layers before an exit, and the exit. Returns the folder."""
    cut = classifier.cut()
    described = ExitFile(
        name=name,
        layer=cut.layer,
        exit=cut.exit.shape,
        backbone=folder_config(classifier.backbone),
        label_names=tuple(label_names) if label_names is not None else None,
    )
    config = {"selfsup_exit": described.model_dump(mode="json", exclude_none=True)}
    return write_folder(Path(out), config, cut.state_dict(), "exit")


def export_onnx(classifier: nn.Module, backbone: Backbone, path: str | Path) -> float:
    """Write a classifier as ONNX: images [batch, C, H, W] -> logits [batch, classes].

    backbone: whose images it takes. Returns the largest absolute difference that ONNX Runtime shows on noise.
    """
    images = noise(backbone, None, batch=2), noise(backbone, None, batch=3)
    return onnx_of(_copy(classifier).eval(), images, Path(path), ("logits",))


def load_exit(folder: str | Path) -> ExitClassifier:
    """What `export_exit` wrote, in eval mode on the CPU; `.backbone` has mean, std and image_size. Raises UserError."""
    folder = Path(folder)
    try:
        recorded = json.loads((folder / "config.json").read_text())
        state = load_file(folder / "model.safetensors")
    except Exception as error:  # OSError, ValueError, SafetensorError
        raise UserError(f"{folder}: not an exported exit: {one_line(error, 160)}") from None
    if not isinstance(recorded, dict) or "selfsup_exit" not in recorded:
        raise UserError(
            f"{folder}/config.json: not of an exit (no 'selfsup_exit'); selfsup export RUN@exit1 OUT writes one"
        )
    where = str(folder / "config.json")
    file = validate(ExitFile, recorded["selfsup_exit"], where=where)
    with torch.random.fork_rng(devices=[]):
        backbone = cut_after(rebuild(file.backbone, where), file.layer)
        classifier = ExitClassifier(backbone, file.layer, Exit(file.exit)).eval()
    try:
        classifier.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"{folder}: the weights do not fit its config.json: {one_line(error, 300)}") from None
    return classifier


def _copy(module: Any) -> Any:
    """On the CPU, float32, contiguous."""
    out = copy.deepcopy(module).to("cpu", torch.float32, memory_format=torch.contiguous_format)
    return out.requires_grad_(False)


def export_target(run: str, name: str, out: Path, format: str) -> str:
    """`selfsup export RUN@exit2 OUT`: the folder, or ONNX; what to say of it. Raises UserError for what the run has not."""
    from selfsup.methods.load import load_classifiers

    found = load_classifiers(run).classifiers
    if name not in found:
        known = ", ".join(["student", "teacher", *found])
        raise UserError(f"target {run}@{name}: no part of that name{suggest(name, known.split(', '))}; known: {known}")
    module = found[name]
    backbone = next(m for m in module.modules() if isinstance(m, Backbone))
    if format == "onnx":
        return f"{out}: images -> logits; largest difference to ours {export_onnx(module, backbone, out):.2e}"
    names = load_classifier(Path(run) / "classifier").label_names if has_classifier(Path(run) / "classifier") else None
    if isinstance(module, ExitClassifier):
        export_exit(module, name, out, names)
        with torch.no_grad():
            images = noise(backbone, None, batch=2)
            difference = float((load_exit(out)(images) - _copy(module).eval()(images)).abs().max())
        count = sum(p.numel() for p in module.cut().parameters()) / 1e6
        return f'{out}: {count:.2f} M parameters; selfsup.load_exit("{out}"); largest difference to ours {difference:g}'
    if not hasattr(module, "head"):
        raise UserError(f"target {run}@{name}: not one network with one head; use --format onnx")
    try:
        export_classifier(module, out, names)
    except NotAsTimm as why:
        raise UserError(f"target {run}@{name}: no model of timm's: {why}; use --format onnx") from None
    return f'{out}: timm.create_model("local-dir:{out}", pretrained=True)'
