"""Multi-crop: which views there are, what is drawn for each, and the crops themselves.

Everything drawn is a pure function of (seed, epoch, image index, view number), through the 64-bit counter generator
SplitMix64 (Steele et al., 2014), for a whole batch at once. The distributions are torchvision's RandomResizedCrop,
RandomHorizontalFlip, ColorJitter, RandomGrayscale, RandomErasing, and the blur and solarization of DINO's code (Caron et
al., 2021, `main_dino.py`, DataAugmentationDINO; `utils.py`, GaussianBlur). Geometry happens here, on uint8 in the workers,
and after it what `policies` and `style` do; `photometric` does the rest on the training device.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from selfsup.config import Crops, ViewsConfig
from selfsup.data import erasing, noise, style, warp
from selfsup.data.colour import light
from selfsup.data.decode import Pixels
from selfsup.data.sampler import hash64
from selfsup.errors import UserError
from selfsup.randomness import mix

ORDERS = tuple(itertools.permutations(range(4)))
"""Orders of colour jitter by number; 0 brightness, 1 contrast, 2 saturation, 3 hue."""

_TAG = 0xC80B
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ATTEMPTS = 10  # as torchvision's RandomResizedCrop.get_params
# which of the draws is for what; new ones go to the end, so that those of former versions stay as they are
_I, _J, _HFLIP, _VFLIP, _JITTER, _FACTORS, _ORDER, _GRAY, _BLUR, _SIGMA, _SOLARIZE, _DRAWS = (
    2 * _ATTEMPTS + k for k in (0, 1, 2, 3, 4, 5, 9, 10, 11, 12, 13, 14)
)
_LIGHT, _CUTOUT, _ERASE = _DRAWS, _DRAWS + 4, _DRAWS + 6
_WARP = _ERASE + erasing.DRAWS
_NOISE = _WARP + warp.DRAWS
_STYLE = _NOISE + noise.DRAWS
_MODULE = _STYLE + style.DRAWS
_MORE_DRAWS = _MODULE + 1
RESAMPLE = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


Prepared = Image.Image | np.ndarray | Tensor
"""An image as `crops_of` takes it; see `prepare`."""


class ViewParams(NamedTuple):
    """What was drawn for one view; as a row of float32 it travels with the crop."""

    x: float  # the box in pixels of the source: left, top, width, height
    y: float
    w: float
    h: float
    hflip: float  # 0 or 1
    vflip: float
    order: float  # index into ORDERS, or -1: no colour jitter
    brightness: float  # factors as torchvision's adjust_*; 1 leaves the image alone
    contrast: float
    saturation: float
    hue: float  # in turns, -0.5..0.5; 0 leaves the image alone
    gray: float  # 0 or 1
    sigma: float  # of the Gaussian blur in pixels of the crop; 0: none
    solarize: float  # values at or above this are inverted; -1: none
    light_red: float = 0.0  # levels added to each channel
    light_green: float = 0.0
    light_blue: float = 0.0
    erase_x: float = 0.0  # a box in pixels of the crop: left, top, width (0: none), height
    erase_y: float = 0.0
    erase_w: float = 0.0
    erase_h: float = 0.0
    erase_fill: float = 0.0  # what fills it: see `erasing`
    cutout_x: float = 0.0  # a box that is filled with zero
    cutout_y: float = 0.0
    cutout_w: float = 0.0
    cutout_h: float = 0.0
    angle: float = 0.0  # degrees; this and what follows: see `warp`
    move_x: float = 0.0  # fractions of the crop's sides
    move_y: float = 0.0
    zoom: float = 0.0
    shear_x: float = 0.0  # degrees
    shear_y: float = 0.0
    fill: float = 0.0  # 0: none of it
    fill_level: float = 0.0
    noise_std: float = 0.0  # levels: see `noise`
    noise_key: float = 0.0
    salt_part: float = 0.0  # of the pixels
    salt_key: float = 0.0
    style: float = 0.0  # which, and of which image: see `style`
    style_pick: float = 0.0
    style_beta: float = 0.0
    module: float = 0.0  # 0 or 1

    def pack(self) -> np.ndarray:
        """As float32 [P]."""
        return np.array(self, dtype=np.float32)

    @classmethod
    def unpack(cls, row: Sequence[float] | np.ndarray) -> "ViewParams":
        """From a row [P] of what `draw` returns."""
        return cls(*(float(v) for v in row))


P = len(ViewParams._fields)
"""Length of a row of parameters."""

COLUMN = {name: i for i, name in enumerate(ViewParams._fields)}
"""Where in a row a parameter is."""

LIGHT = slice(COLUMN["light_red"], COLUMN["light_blue"] + 1)
ERASE = slice(COLUMN["erase_x"], COLUMN["erase_h"] + 1)
CUTOUT = slice(COLUMN["cutout_x"], COLUMN["cutout_h"] + 1)
WARP = slice(COLUMN["angle"], COLUMN["fill_level"] + 1)
NOISE = slice(COLUMN["noise_std"], COLUMN["salt_key"] + 1)
STYLE = slice(COLUMN["style"], COLUMN["style_beta"] + 1)


@dataclass(frozen=True)
class View:
    """One view of every image."""

    name: str
    crops: Crops
    index: int
    """Within its kind: selects from probabilities given one a view."""
    number: int
    """Among all views: part of the key of what is drawn."""
    kind: str = "global"
    """Consecutive views of one kind and size come in one tensor."""

    @property
    def size(self) -> int:
        """Pixels, square."""
        return self.crops.size

    @property
    def shape(self) -> int | tuple[int, int, int]:
        """The size, or of volumes (depth, height, width) where the depth is another."""
        return self.crops.shape


def multicrop(views: ViewsConfig) -> list[View]:
    """The global views, then the local ones."""
    out: list[View] = []
    for kind, crops in (("global", views.global_), ("local", views.local)):
        out += [View(f"{kind}{i}", crops, i, len(out) + i, kind) for i in range(crops.count)]
    if not out:
        raise UserError("views.global.count=0 and views.local.count=0; at least one view is needed")
    return out


def resolutions(views: Sequence[View]) -> list[list[View]]:
    """Consecutive views of one kind and size: one list for each tensor of a batch."""
    return [list(group) for _, group in itertools.groupby(views, key=lambda view: (view.kind, view.size))]


def uniforms(seed: int, epochs: np.ndarray, indices: np.ndarray, number: int, count: int) -> np.ndarray:
    """float64 [B,count] in [0, 1): `count` draws for every (epoch, index) [B] and the view `number`."""
    key = hash64(epochs.astype(np.uint64) * _GOLDEN + np.uint64(mix(seed, _TAG, number)))
    state = hash64(indices.astype(np.uint64) * _GOLDEN + key)
    bits = hash64(state[:, None] + np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN)
    return (bits >> np.uint64(11)) * (1.0 / (1 << 53))


def draw(view: View, seed: int, epochs: np.ndarray, indices: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """What is drawn for `view` of a batch: float32 [B,P], rows as ViewParams.

    epochs, indices: int64 [B]. sizes: [B,2] height and width of each image. Row b depends on nothing but (seed,
    epochs[b], indices[b], view, sizes[b]).
    """
    crops = view.crops
    erase = crops.probability("erase", view.index)
    noisy = bool(crops.noise or crops.salt_pepper)
    moved, styled = warp.wanted(crops), crops.style != "none"
    more = bool(crops.lighting or crops.cutout or erase or noisy or moved or styled or crops.module)
    u = uniforms(seed, epochs, indices, view.number, _MORE_DRAWS if more else _DRAWS)
    out = np.zeros((len(u), P), dtype=np.float64)
    out[:, :4] = _boxes(u, sizes.astype(np.float64), crops)
    out[:, 4] = u[:, _HFLIP] < crops.hflip
    out[:, 5] = u[:, _VFLIP] < crops.vflip
    jitter = u[:, _JITTER] < crops.probability("jitter", view.index)
    out[:, 6] = np.where(jitter, np.floor(u[:, _ORDER] * len(ORDERS)), -1)
    for k, key in enumerate(("brightness", "contrast", "saturation")):
        strength = getattr(crops, key)
        low, high = max(0.0, 1.0 - strength), 1.0 + strength
        out[:, 7 + k] = np.where(jitter, low + u[:, _FACTORS + k] * (high - low), 1.0)
    out[:, 10] = np.where(jitter, (2 * u[:, _FACTORS + 3] - 1) * crops.hue, 0.0)
    out[:, 11] = u[:, _GRAY] < crops.probability("grayscale", view.index)
    low, high = crops.blur_sigma
    blur = u[:, _BLUR] < crops.probability("blur", view.index)
    out[:, 12] = np.where(blur, low + u[:, _SIGMA] * (high - low), 0.0)
    solarize = u[:, _SOLARIZE] < crops.probability("solarize", view.index)
    out[:, 13] = np.where(solarize, crops.solarize_threshold, -1)
    if crops.lighting:
        out[:, LIGHT] = light(u[:, _LIGHT:_CUTOUT], crops.lighting)
    if crops.cutout:
        out[:, CUTOUT] = erasing.squares(u[:, _CUTOUT:_ERASE], crops.cutout, crops.size)
    if erase:
        of_erasing = u[:, _ERASE:_WARP]
        out[:, ERASE] = erasing.boxes(of_erasing, erase, crops.size, crops.erase_area, crops.erase_ratio)
        out[:, COLUMN["erase_fill"]] = erasing.fills(of_erasing, crops.erase_fill)
    if moved:
        out[:, WARP] = warp.drawn(u[:, _WARP:_NOISE], crops)
    if noisy:
        out[:, NOISE] = noise.drawn(u[:, _NOISE:_STYLE], crops)
    if styled:
        out[:, STYLE] = style.drawn(u[:, _STYLE:_MODULE], crops)
    if crops.module:
        out[:, COLUMN["module"]] = u[:, _MODULE] < crops.module_probability
    return out.astype(np.float32)


def _boxes(u: np.ndarray, sizes: np.ndarray, crops: Crops) -> np.ndarray:
    """torchvision's RandomResizedCrop.get_params for a batch: [B,4] x, y, w, h."""
    height, width = sizes[:, :1], sizes[:, 1:]  # [B,1]
    (s0, s1), (r0, r1) = crops.scale, crops.ratio
    area = height * width * (s0 + u[:, 0 : 2 * _ATTEMPTS : 2] * (s1 - s0))  # [B,attempts]
    log0, log1 = np.log(r0), np.log(r1)
    aspect = np.exp(log0 + u[:, 1 : 2 * _ATTEMPTS : 2] * (log1 - log0))
    w, h = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (w > 0) & (h > 0) & (w <= width) & (h <= height)
    first = np.argmax(fits, axis=1)[:, None]
    w, h = np.take_along_axis(w, first, 1)[:, 0], np.take_along_axis(h, first, 1)[:, 0]  # [B]
    height, width, found = height[:, 0], width[:, 0], fits.any(1)
    x, y = np.floor(u[:, _J] * (width - w + 1)), np.floor(u[:, _I] * (height - h + 1))
    # no attempt fitted: the largest centred box of an allowed aspect ratio
    ratio = width / height
    w2 = np.where(ratio > r1, np.clip(np.rint(height * r1), 1, width), width)
    h2 = np.where(ratio < r0, np.clip(np.rint(width / r0), 1, height), height)
    x2, y2 = np.floor((width - w2) / 2), np.floor((height - h2) / 2)
    return np.stack([np.where(found, a, b) for a, b in ((x, x2), (y, y2), (w, w2), (h, h2))], axis=1)


def sample_params(view: View, seed: int, epoch: int, index: int, height: int, width: int) -> ViewParams:
    """What is drawn for `view` of one image of this size: a pure function."""
    row = draw(view, seed, np.array([epoch]), np.array([index]), np.array([[height, width]]))[0]
    return ViewParams.unpack(row)


def crop(image: Pixels, params: ViewParams, size: int, interpolation: str = "bicubic") -> np.ndarray:
    """The resized and flipped crop, uint8 [C,size,size]: torchvision's `resized_crop`, `hflip` and `vflip`.

    Grey images and those of more than four channels equal PIL's resizing bit for bit. Three and four channels take torch's
    uint8 kernel, five to seven times faster: within a level of PIL's, except that bicubic overshoot is cut between
    the two passes in another order (mean difference below 0.5 levels on noise, 0.01 on photographs). Alpha, if
    there is any, is a channel like the others.
    """
    return crops_of([prepare(image)], params.pack()[None], size, interpolation)[0].transpose(
        2, 0, 1
    )  # [S,S,C] -> [C,S,S]


def prepare(image: Pixels) -> Prepared:
    """What `crops_of` takes: colour images as tensors [1,C,H,W], channels last in memory; others as they are."""
    if isinstance(image, Image.Image) and image.mode in ("RGB", "RGBA"):
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]  # [H,W,C] -> [1,C,H,W]
    return image


def crops_of(images: Sequence[Prepared], params: np.ndarray, size: int, interpolation: str) -> np.ndarray:
    """As `crop`, one for each of B images of one kind: params [B,P] -> uint8 [B,size,size,C]."""
    resample = RESAMPLE[interpolation]
    geometry = params[:, :4].astype(np.int64)
    geometry[:, 2:] += geometry[:, :2]  # width, height -> right, bottom
    boxes: list[tuple[int, int, int, int]] = [(x, y, r, b) for x, y, r, b in geometry.tolist()]
    pairs: list[tuple[Any, tuple[int, int, int, int]]] = list(zip(images, boxes, strict=True))
    if isinstance(images[0], Image.Image):  # one sheet for all, so that PIL hands over its pixels once
        sheet = Image.new(images[0].mode, (size, size * len(images)))
        for i, (image, box) in enumerate(pairs):
            sheet.paste(resized(image, box, (size, size), resample), (0, size * i))
        out = np.array(sheet).reshape(len(images), size, size, -1)
    elif isinstance(images[0], np.ndarray):
        out = np.stack([resized_array(image, box, (size, size), resample) for image, box in pairs])
    else:
        out = np.empty((len(images), size, size, images[0].shape[1]), np.uint8)
        for target, (image, box) in zip(torch.from_numpy(out), pairs, strict=True):
            target.copy_(_resized_tensor(image, box, size, interpolation))
    for image, hflip, vflip in zip(torch.from_numpy(out), params[:, 4] > 0, params[:, 5] > 0, strict=True):
        if hflip or vflip:  # torch is several times faster than numpy at this
            image.copy_(image.flip([axis for axis, flip in ((0, vflip), (1, hflip)) if flip]))
    return out


def _resized_tensor(image: Tensor, box: tuple[int, int, int, int], size: int, interpolation: str) -> Tensor:
    """[1,C,H,W] -> uint8 [size,size,C]."""
    left, top, right, bottom = box
    part = image[:, :, top:bottom, left:right].contiguous(memory_format=torch.channels_last)
    out = interpolate(part, size=(size, size), mode=interpolation, antialias=True)
    return out[0].permute(1, 2, 0)


def resized(
    image: Image.Image, box: tuple[int, int, int, int], size: tuple[int, int], resample: Image.Resampling
) -> Image.Image:
    """The box (left, top, right, bottom) of an image, resized to (width, height)."""
    if box != (0, 0, image.width, image.height):
        image = image.crop(box)  # first, so that the filter sees no pixels outside the box
    return image.resize(size, resample)


def resized_array(
    image: np.ndarray, box: tuple[int, int, int, int], size: tuple[int, int], resample: Image.Resampling
) -> np.ndarray:
    """As `resized` for [H,W,C] of any C: uint8 channel by channel; uint16 by torch's float kernel, to whole levels."""
    left, top, right, bottom = box
    part = image[top:bottom, left:right]
    if image.dtype == np.uint16:
        planes = torch.from_numpy(part.transpose(2, 0, 1).astype(np.float32))[None]  # [1,C,h,w]
        mode = "bilinear" if resample == Image.Resampling.BILINEAR else "bicubic"
        made = interpolate(planes, size=(size[1], size[0]), mode=mode, antialias=True)
        return made[0].round_().clamp_(0, 65535).permute(1, 2, 0).contiguous().numpy().astype(np.uint16)
    resized_planes = [
        Image.fromarray(np.ascontiguousarray(part[:, :, c])).resize(size, resample) for c in range(image.shape[2])
    ]
    return np.stack([np.asarray(plane) for plane in resized_planes], axis=-1)
