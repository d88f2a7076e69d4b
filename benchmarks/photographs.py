"""JPEG files of 500 x 375 pixels, made from scikit-image's sample photographs, in class folders."""

import io
import random
from pathlib import Path

from PIL import Image, ImageOps

SIZE = (500, 375)
QUALITY = 90
_NAMES = ("astronaut", "chelsea", "coffee", "rocket", "immunohistochemistry", "retina", "hubble_deep_field")


def photographs() -> list[Image.Image]:
    """Those that this installation holds, as RGB images of `SIZE`."""
    import skimage.data

    found = []
    for name in _NAMES:
        try:
            pixels = getattr(skimage.data, name)()
        except Exception:  # some are fetched from the network when they are first asked for
            continue
        found.append(Image.fromarray(pixels[..., :3]).resize(SIZE, Image.Resampling.BICUBIC))
    if not found:
        raise RuntimeError("scikit-image has none of its sample photographs here")
    return found


def write(folder: Path, count: int, classes: int = 4, seed: int = 0) -> None:
    """`count` different files in `classes` folders: parts of the photographs, mirrored at random."""
    draw, sources = random.Random(seed), photographs()
    for i in range(count):
        image = sources[i % len(sources)]
        share = draw.uniform(0.7, 1.0)
        width, height = round(SIZE[0] * share), round(SIZE[1] * share)
        left, top = draw.randint(0, SIZE[0] - width), draw.randint(0, SIZE[1] - height)
        image = image.crop((left, top, left + width, top + height)).resize(SIZE, Image.Resampling.BICUBIC)
        if draw.random() < 0.5:
            image = ImageOps.mirror(image)
        path = folder / f"class{i % classes}" / f"{i:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        data = io.BytesIO()
        image.save(data, "JPEG", quality=QUALITY)
        path.write_bytes(data.getvalue())
