"""A small real segmentation set: garments cut out of the bundled images, composed on scikit-image's photographs.

    python benchmarks/composed.py OUT [--train 600] [--val 200] [--size 64] [--seed 0]

writes OUT/train/{images,masks}, OUT/val/{images,masks} and OUT/classes.txt: PNG files, a mask's ids being 0 (background) and
1 to 4 (CLASSES). Nothing is downloaded, and the same arguments give the same files.

No colour rule solves it: an object has the mean colour and the contrast of a piece of some photograph of the same part, so that
colours of objects and of backgrounds have one distribution. Nor does its outline: each picture also holds a piece of another
photograph in the shape of an ellipse or a box, which is background. What tells the classes is shape and texture. Train and val
share neither garments nor photographs.

Sources: Fashion-MNIST (Xiao et al., 2017; MIT licence, see selfsup/data/fashion/LICENSE), whose products were photographed on
black, so that the outline can be taken from the picture itself; and photographs that come inside scikit-image, all of them CC0 or
in the public domain by its documentation (`skimage.data`).
"""

import argparse
import io
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

import selfsup.data
from selfsup.randomness import generator

CLASSES = ("trouser", "sandal", "bag", "ankle-boot")
PHOTOGRAPHS = {
    "train": ("astronaut", "camera", "rocket", "brick", "grass", "gravel", "coins", "immunohistochemistry"),
    "val": ("chelsea", "coffee", "moon", "clock", "retina", "hubble_deep_field"),
}
_FASHION = Path(selfsup.data.__file__).parent / "fashion"
_CUT = {"train": 150, "val": 60}  # garments of a class


def photographs(part: str) -> list[np.ndarray]:
    """The photographs of a part, uint8 [H, W, 3], their shorter side at most 300 pixels."""
    import skimage.data

    found = []
    for name in PHOTOGRAPHS[part]:
        image = Image.fromarray(getattr(skimage.data, name)()).convert("RGB")
        scale = 300 / min(image.size)
        if scale < 1:
            image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
        found.append(np.asarray(image))
    return found


def garments(part: str) -> dict[int, list[np.ndarray]]:
    """Class id -> grey pictures uint8 [28, 28] of garments on black."""
    with zipfile.ZipFile(_FASHION / f"{part}.zip") as archive:
        names = sorted(n for n in archive.namelist() if n.endswith(".png"))
        out = {}
        for i, kind in enumerate(CLASSES, 1):
            members = [n for n in names if n.split("/")[-2].endswith(f"_{kind}")][: _CUT[part]]
            out[i] = [np.asarray(Image.open(io.BytesIO(archive.read(n))).convert("L")) for n in members]
    return out


def outline(grey: np.ndarray) -> np.ndarray:
    """bool [H, W]: the garment in a grey picture on black, with its dark inner parts; gaps between straps stay gaps."""
    from scipy import ndimage

    inside = ndimage.binary_closing(grey > 24, iterations=1)
    parts, count = ndimage.label(inside)
    if count > 1:  # dust
        sizes = ndimage.sum_labels(inside, parts, range(1, count + 1))
        inside = np.isin(parts, 1 + np.flatnonzero(sizes >= 0.05 * sizes.max()))
    holes = ndimage.binary_fill_holes(inside) & ~inside
    labels, count = ndimage.label(holes)
    small = [i for i in range(1, count + 1) if (labels == i).sum() < 0.02 * inside.sum()]
    return inside | np.isin(labels, small)


def _piece(photos: list[np.ndarray], size: int, rng: np.random.Generator) -> np.ndarray:
    """A random square of a random photograph, mirrored half the time: uint8 [size, size, 3]."""
    photo = photos[rng.integers(len(photos))]
    side = int(rng.integers(size, min(photo.shape[:2]) + 1))
    top, left = (int(rng.integers(0, n - side + 1)) for n in photo.shape[:2])
    square = Image.fromarray(photo[top : top + side, left : left + side])
    pixels = np.asarray(
        square.resize((size, size), Image.Resampling.BOX if side > 2 * size else Image.Resampling.BICUBIC)
    )
    return pixels[:, ::-1] if rng.random() < 0.5 else pixels


def _object(
    grey: np.ndarray, photos: list[np.ndarray], side: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """(colours float [side, side, 3], outline bool [side, side]): a garment in the colours of a piece of a photograph."""
    big = np.asarray(Image.fromarray(grey).resize((side, side), Image.Resampling.BICUBIC))
    big = big[:, ::-1] if rng.random() < 0.5 else big
    inside = outline(big)
    swatch = _piece(photos, 16, rng).reshape(-1, 3).astype(float)
    shade = (big - big[inside].mean()) / (big[inside].std() + 8.0)  # [side, side]
    contrast = np.clip(swatch.std(axis=0), 12, 40)
    sign = 1.0 if rng.random() < 0.5 else -1.0  # negatives too: bright is no rule either
    return swatch.mean(axis=0) + sign * shade[:, :, None] * contrast, inside


def _distractor(size: int, rng: np.random.Generator) -> np.ndarray:
    """bool [size, size]: an ellipse or a box."""
    canvas = Image.new("1", (size, size))
    w, h = rng.integers(size // 5, size // 2, 2)
    x, y = int(rng.integers(0, size - w)), int(rng.integers(0, size - h))
    draw = ImageDraw.Draw(canvas)
    (draw.ellipse if rng.random() < 0.5 else draw.rectangle)((x, y, x + int(w), y + int(h)), fill=1)
    return np.asarray(canvas)


def scenes(part: str, count: int, size: int = 64, seed: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """`count` pairs (image uint8 [size, size, 3], mask uint8 [size, size]); one object each, every class equally often."""
    photos, cut = photographs(part), garments(part)
    for i in range(count):
        rng = generator(seed, 0xC0405, part == "val", i)
        image = _piece(photos, size, rng).astype(float)
        mask = np.zeros((size, size), np.uint8)
        shape = _distractor(size, rng)
        image[shape] = _piece(photos, size, rng)[shape]
        kind = i % len(CLASSES) + 1
        side = int(rng.integers(round(0.6 * size), round(0.95 * size)))
        colours, inside = _object(cut[kind][rng.integers(len(cut[kind]))], photos, side, rng)
        top, left = (int(rng.integers(0, size - side + 1)) for _ in range(2))
        image[top : top + side, left : left + side][inside] = colours[inside]
        mask[top : top + side, left : left + side][inside] = kind
        image += rng.normal(0, 3, image.shape)  # one noise over all: no difference in grain
        yield np.clip(np.rint(image), 0, 255).astype(np.uint8), mask


def build(out: Path, train: int = 600, val: int = 200, size: int = 64, seed: int = 0) -> Path:
    """Write the set below `out` and return `out`."""
    for part, count in (("train", train), ("val", val)):
        for kind in ("images", "masks"):
            (out / part / kind).mkdir(parents=True, exist_ok=True)
        for i, (image, mask) in enumerate(scenes(part, count, size, seed)):
            Image.fromarray(image).save(out / part / "images" / f"{i:05d}.png")
            Image.fromarray(mask).save(out / part / "masks" / f"{i:05d}.png")
    (out / "classes.txt").write_text("\n".join(("background", *CLASSES)) + "\n")
    return out


def main() -> None:
    """The command line above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    for name, default in (("train", 600), ("val", 200), ("size", 64), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    build(options.out, options.train, options.val, options.size, options.seed)
    print(f"{options.out}: {options.train} training and {options.val} val images of {options.size} pixels")


if __name__ == "__main__":
    main()
