"""What the verbs on patch features share: masks in files, whole images as squares, maps of features, overlays."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from selfsup.backbones import Backbone
from selfsup.data.eval_transform import eval_batches
from selfsup.data.mask_files import matched, read_ids
from selfsup.data.sources import Source
from selfsup.errors import UserError

from .features import Transform
from .targets import Target

_BATCH = 16


def backbone_of(target: Target, task: str) -> Backbone:
    """The target's; raises UserError for raw pixels."""
    if target.backbone is None:
        raise UserError(f"eval {task} pixels: raw pixels have no patch features; name a run or a backbone")
    return target.backbone


def read_mask(path: Path) -> np.ndarray:
    """Ids int64 [H, W] of a mask file (see `masks`)."""
    return read_ids(path).astype(np.int64)


def mask_files(source: Source, spec: str, folder: str) -> list[Path]:
    """The mask of every image of `data=spec`. Raises UserError naming an image that has none."""
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise UserError(f"masks={folder}: no such folder; give the one that holds a mask for every image")
    return matched(image_names(source, spec), root)


def image_names(source: Source, spec: str) -> list[Path]:
    """Relative to the folder `data=spec` where they are files in it."""
    top = Path(spec).expanduser()
    names = [Path(source.name(i)) for i in range(len(source))]
    return [p.relative_to(top) if p.is_relative_to(top) else p for p in names]


def squares(source: Source, rows: np.ndarray, transform: Transform) -> Iterator[tuple[Tensor, np.ndarray]]:
    """(images [B, C, S, S], squeezed whole to a square and normalised, their rows), in order; those that can be read."""
    for x, _, ids in eval_batches(
        source, size=transform.size, interpolation=transform.interpolation, mean=transform.mean, std=transform.std,
        batch_size=_BATCH, indices=rows, crop=False, on_bad=lambda name, reason: None,
    ):  # fmt: skip
        yield x, ids.numpy()


@torch.no_grad()
def maps_of(backbone: Backbone, images: Tensor, layer: int) -> Tensor:
    """[B, C, H, W], normalised -> a layer's features, of length 1: float32 [B, h, w, D], on the host."""
    maps = backbone.feature_maps(images.to(next(backbone.parameters()).device), [layer])[0].float()  # [B, D, h, w]
    if maps.ndim != 4:
        raise UserError(
            f"{backbone.name}: its maps have three axes, where those of images are needed; give a backbone of images"
        )
    return F.normalize(maps.permute(0, 2, 3, 1), dim=-1).cpu()


def has_keys(backbone: Backbone) -> bool:
    """Whether `keys_of` works: a ViT whose attention has one layer for queries, keys and values."""
    return backbone.has_attention and _last_qkv(backbone) is not None


@torch.no_grad()
def keys_of(backbone: Backbone, images: Tensor) -> Tensor:
    """Keys of the last attention of all heads, side by side: float32 [B, h, w, D], on the host; as they are."""
    qkv, seen = _last_qkv(backbone), []
    if qkv is None:
        raise UserError(f"{backbone.name}: no keys of an attention over the image; use features=output")
    handle = qkv.register_forward_hook(lambda _module, _args, out: seen.append(out))
    try:
        patches = backbone(images.to(next(backbone.parameters()).device)).patches  # [B, D, h, w]
    finally:
        handle.remove()
    h, w = patches.shape[-2:]
    q_k_v = seen[-1]  # [B, prefix + h*w, 3*D]
    keys = q_k_v[:, -h * w :, q_k_v.shape[2] // 3 : 2 * (q_k_v.shape[2] // 3)]
    return keys.float().reshape(len(images), h, w, -1).cpu()


def _last_qkv(backbone: Backbone) -> nn.Module | None:
    layers = [getattr(m, "qkv", None) for m in backbone.model.modules() if hasattr(m, "attn_drop")]
    return next((layer for layer in reversed(layers) if isinstance(layer, nn.Linear)), None)


def palette(count: int) -> np.ndarray:
    """uint8 [count, 3]: PASCAL VOC's colours, id 0 black; distinct for the first 256 ids."""
    ids = np.arange(count)
    out = np.zeros((count, 3), np.int64)
    for j in range(8):
        for channel in range(3):
            out[:, channel] |= (ids >> (3 * j + channel) & 1) << (7 - j)
    return out.astype(np.uint8)


def overlay(image: np.ndarray, ids: np.ndarray, ignore: int | None = None) -> np.ndarray:
    """Image [H, W, 3] in [0, 1] under the colours of ids [H', W'], which are brought to its size; id 0 stays clear."""
    at = np.asarray(Image.fromarray(ids.astype(np.int32)).resize(image.shape[1::-1], Image.Resampling.NEAREST))
    colours = palette(int(at.max()) + 1)[at] / 255
    covered = (at > 0) & (at != (-1 if ignore is None else ignore))
    return np.where(covered[..., None], 0.45 * image + 0.55 * colours, 0.85 * image)


def save_mask(ids: np.ndarray, path: Path) -> None:
    """Ids [H, W] below 256 as a palette PNG."""
    image = Image.fromarray(ids.astype(np.uint8))
    image.putpalette(palette(256).tobytes())
    image.save(path)
