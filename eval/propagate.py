"""`selfsup eval propagate`: masks of a video's first frame carried through the others by features alone.

The protocol of DINO (Caron et al., 2021, section 4.2.2 and its `eval_video_segmentation.py`, after Jabri et al., 2020): each
patch takes the labels of its most alike patches in the first frame and in some frames before, near its own place, weighted by
exp(cosine / T); labels stay soft, and are enlarged to the frame's size for the mask.
"""

from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from selfsup import dist
from selfsup.backbones import Backbone
from selfsup.data import mask_files
from selfsup.data.arrays import eight_bits
from selfsup.data.base import Source
from selfsup.data.batch import pixel_size
from selfsup.data.eval_transform import resized
from selfsup.data.sources import BadImage, open_source
from selfsup.errors import UserError

from . import results
from .canvas import INK, bare, new_figure, save
from .datasets import data_options
from .davis import contour, region
from .dense import backbone_of, image_names, maps_of, overlay, read_mask, save_mask
from .pca import layer_of
from .progress import Progress
from .settings import resolve
from .settings_dense import PropagateSettings
from .shown import beside, displayed, spread
from .targets import Target, open_target

_ROWS = 512  # patches compared with the whole context at a time


def run(target: str, overrides: list[str], out: Path | None = None) -> dict[str, Any]:
    """Write a mask a frame into a folder, J&F into `out` or RUN/eval/propagate.json, and a picture."""
    settings = resolve("propagate", overrides)
    assert isinstance(settings, PropagateSettings)
    results.check_destination(out)
    opened = open_target(target, device=settings.device)
    backbone = backbone_of(opened, "propagate")
    source, first, truths = open_frames(opened, settings)
    if not dist.is_main():
        return {}
    size = frame_size(backbone, first.shape, settings.size)
    start = frame(source, 0, size, backbone) if settings.layer is None else None
    layer = layer_of(backbone, start, settings.layer, settings.size)
    folder = masks_folder(opened, out)
    found = [first]
    save_mask(first, folder / f"{Path(source.name(0)).stem}.png")
    progress = Progress(len(source) - 1, "frames")
    for i, mask in enumerate(propagate(backbone, source, first, size, layer, settings), start=1):
        save_mask(mask, folder / f"{Path(source.name(i)).stem}.png")
        found.append(mask)
        progress.advance(1)
    progress.close()
    objects = np.unique(first[first > 0]).tolist()
    metrics: dict[str, float] = {}
    table: list[dict[str, Any]] | None = None
    if truths is not None:
        judged = range(1, len(found) - 1) if len(found) > 2 else range(1, len(found))
        known = {i: read_mask(truths[i]) for i in judged}
        table = [score(o, found, known) for o in objects]
        metrics = {key: float(np.mean([row[key] for row in table])) for key in ("j_and_f", "j", "f")}
    protocol = {
        "method": "label propagation of the first frame and of frames before, as DINO's eval_video_segmentation",
        **settings.model_dump(include={"context", "k", "radius", "temperature"}),
        "layer": layer,
        "frame_size": list(size),
        "metric": "mean over objects of the means over frames; the first and the last frame are left out, as DAVIS does",
        "val": settings.data.path,
        "frames": len(found),
        "objects": len(objects),
        "note": f"masks are in {folder}",
        "versions": results.versions(),
    }
    result = results.result(
        "propagate", opened, metrics or {"covered": float(np.mean([(m > 0).mean() for m in found]))}, protocol, table
    )
    results.save(result, opened, out)
    results.show(result, out)
    picture = beside("propagate", opened, out)
    if picture is not None:
        print(f"picture: {_draw(source, found, picture, settings.images, backbone)}")
    return result


def open_frames(target: Target, settings: PropagateSettings) -> tuple[Source, np.ndarray, list[Path] | None]:
    """(frames in the order of their names, the first one's mask, files of all frames' masks if there are)."""
    if settings.data.path is None or settings.masks is None:
        raise UserError("eval propagate: give data=FRAMES masks=FIRST.png, or masks=FOLDER with a mask for every frame")
    backbone = backbone_of(target, "propagate")
    source = open_source(settings.data.path, channels=backbone.in_chans, config=data_options(target, settings))
    if len(source) < 2:
        raise UserError(f"data={settings.data.path}: {len(source)} frame; two or more are needed")
    path, truths = Path(settings.masks).expanduser(), None
    if path.is_dir():
        found = mask_files.find(image_names(source, settings.data.path), path)
        if found[0] is None:
            raise UserError(f"masks={path}: no {Path(source.name(0)).stem}.png, the mask of the first frame")
        every = [mask for mask in found if mask is not None]
        truths = every if len(every) == len(found) else None
        path = found[0]
    first = read_mask(path)
    if not (first > 0).any():
        raise UserError(f"{path}: no object in the first frame's mask; ids above 0 are objects")
    if first.max() > 255:
        raise UserError(f"{path}: id {first.max()}; objects have ids from 1 to 255")
    shape = pixel_size(_read(source, 0))
    if first.shape != shape:
        raise UserError(
            f"{path}: {first.shape[0]} x {first.shape[1]} pixels; the first frame has {shape[0]} x {shape[1]}"
        )
    return source, first, truths


def masks_folder(target: Target, out: Path | None) -> Path:
    """Where the masks are written: beside `out`, or RUN/eval/propagate."""
    if out is None and target.run is None:
        raise UserError(f"eval propagate {target.name}: it belongs to no run; name a result file with --out FILE.json")
    folder = out.with_suffix("") if out is not None else Path(target.run or "") / "eval" / "propagate"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: masks cannot be written: {error.strerror}") from None
    return folder


def frame_size(backbone: Backbone, shape: tuple[int, ...], short: int | None) -> tuple[int, int]:
    """(height, width) of frames as the backbone sees them: multiples of its patch, or the one size it takes."""
    if backbone.fixed_size:
        return backbone.image_size
    step, scale = max(1, backbone.stride), (short or 480) / min(shape)
    height, width = (max(step, round(side * scale / step) * step) for side in shape)
    backbone.check_size((height, width))
    return height, width


def _read(source: Source, i: int) -> Any:
    try:
        return eight_bits(source.read(i))
    except BadImage as error:
        raise UserError(f"{source.name(i)}: cannot be read: {error}") from None


def frame(source: Source, i: int, size: tuple[int, int], backbone: Backbone) -> Tensor:
    """Frame i, normalised: [1, C, *size]."""
    pixels = torch.from_numpy(np.array(resized(_read(source, i), (size[1], size[0]), Image.Resampling.BICUBIC)))
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (backbone.mean, backbone.std))
    return ((pixels.permute(2, 0, 1).float() / 255 - mean) / std)[None]


def propagate(
    backbone: Backbone,
    source: Source,
    first: np.ndarray,
    size: tuple[int, int],
    layer: int,
    settings: PropagateSettings,
) -> Any:
    """Masks int64 [H, W], of the first one's size, of the second and every further frame."""
    start = maps_of(backbone, frame(source, 0, size, backbone), layer)[0]  # [h, w, D]
    objects = [0, *np.unique(first[first > 0]).tolist()]
    one_hot = torch.from_numpy(np.stack([first == o for o in objects]).astype(np.float32))  # [O, H, W]
    labels = F.adaptive_avg_pool2d(one_hot[None], (start.shape[0], start.shape[1]))[0].permute(1, 2, 0)  # [h, w, O]
    before: deque[tuple[Tensor, Tensor]] = deque(maxlen=settings.context)
    for i in range(1, len(source)):
        features = maps_of(backbone, frame(source, i, size, backbone), layer)[0]
        context = [(start, labels), *before]
        soft = carried(features, [c[0] for c in context], [c[1] for c in context], settings)
        before.append((features, soft))
        yield np.array(objects)[_sharpened(soft, first.shape)]


def carried(features: Tensor, context: list[Tensor], labels: list[Tensor], settings: PropagateSettings) -> Tensor:
    """Soft labels [h, w, O] of a frame's features [h, w, D], of length 1, from those of context frames [h, w, D], [h, w, O]."""
    h, w, d = features.shape
    queries = features.reshape(-1, d)
    keys, values = torch.cat([c.reshape(-1, d) for c in context]), torch.cat([v.reshape(h * w, -1) for v in labels])
    row, column = torch.arange(h * w) // w, torch.arange(h * w) % w
    out = []
    for some in torch.arange(h * w).split(_ROWS):
        cosine = queries[some] @ keys.T  # [q, F * h * w]
        if settings.radius:
            far = (row[some, None] - row).abs().gt(settings.radius) | (column[some, None] - column).abs().gt(
                settings.radius
            )
            cosine = cosine.masked_fill(far.repeat(1, len(context)), -torch.inf)
        best, index = cosine.topk(min(settings.k, cosine.shape[1]), dim=1)  # [q, k]
        weights = torch.softmax(best / settings.temperature, dim=1)  # exp(cosine / T), to the sum 1
        out.append((weights[..., None] * values[index]).sum(dim=1))
    return torch.cat(out).view(h, w, -1)


def _sharpened(soft: Tensor, size: tuple[int, ...]) -> np.ndarray:
    """The largest label [H, W] of soft ones [h, w, O], each stretched to 0..1 first (DINO's norm_mask)."""
    large = F.interpolate(soft.permute(2, 0, 1)[None], size=size, mode="bilinear", align_corners=False)[0]
    low, high = large.amin(dim=(1, 2), keepdim=True), large.amax(dim=(1, 2), keepdim=True)
    stretched = torch.where(high > 0, (large - low) / (high - low).clamp_min(1e-12), large)
    return stretched.argmax(dim=0).numpy()


def score(id_: int, found: list[np.ndarray], truths: dict[int, np.ndarray]) -> dict[str, Any]:
    """{"object", "j_and_f", "j", "f"} of one object: means over the frames that are judged."""
    j = float(np.mean([region(found[i] == id_, truth == id_) for i, truth in truths.items()]))
    f = float(np.mean([contour(found[i] == id_, truth == id_) for i, truth in truths.items()]))
    return {"object": id_, "j_and_f": (j + f) / 2, "j": j, "f": f}


def _draw(source: Source, found: list[np.ndarray], path: Path, count: int, backbone: Backbone) -> Path:
    rows = spread(len(found), count)
    shape = found[0].shape
    scale = min(1.0, 256 / max(shape))
    size = (max(1, round(shape[0] * scale)), max(1, round(shape[1] * scale)))
    figure = new_figure(1.8 * len(rows), 1.8 * shape[0] / shape[1] + 0.7)
    grid = figure.subplots(1, len(rows), squeeze=False)
    for axes, i in zip(grid[0], rows.tolist()):
        bare(axes, f"frame {i}")
        axes.imshow(overlay(displayed(frame(source, i, size, backbone), backbone.mean, backbone.std)[0], found[i]))
    figure.suptitle("The first frame's mask, carried on", fontsize=10, color=INK)
    return save(figure, path)
