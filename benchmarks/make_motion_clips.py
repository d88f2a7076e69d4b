"""Make clips of camera motion over real photographs: what moves how is known, and a single frame does not tell.

    python benchmarks/make_motion_clips.py OUT [--clips 40] [--frames 12] [--size 40] [--format frames|mp4|mkv] [--seed 0]
        [--motions pan_left,pan_right]

Writes OUT/train and OUT/val with one folder for each motion: pan_left, pan_right, pan_up, pan_down, zoom_in, zoom_out,
turn_left, turn_right. Each motion is the one before or after it played backwards, so that the frames of a pair are alike in
number and kind and only their order tells them apart. The photographs are those that scikit-image ships; train and val are
cut from different parts of them (left and right of 60 % of the width). Clips are folders of PNGs, or video files encoded by
PyAV. The same arguments give the same frames.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

MOTIONS = ("pan_left", "pan_right", "pan_up", "pan_down", "zoom_in", "zoom_out", "turn_left", "turn_right")
_PHOTOS = (
    "astronaut.png",
    "coffee.png",
    "chelsea.png",
    "rocket.jpg",
    "brick.png",
    "grass.png",
    "gravel.png",
    "ihc.png",
)
_TRAIN = 0.6


def photographs() -> list[Image.Image]:
    """Those that are packaged with this version of scikit-image, in colour."""
    import skimage

    folder = Path(skimage.__file__).parent / "data"
    return [Image.open(path).convert("RGB") for name in _PHOTOS if (path := folder / name).is_file()]


def clip(photo: Image.Image, motion: str, frames: int, size: int, random: np.random.Generator) -> list[Image.Image]:
    """A camera over a photograph: `frames` pictures of `size` pixels."""
    kind, way = motion.split("_")
    forwards = way in ("right", "down", "out")
    speed = random.uniform(0.04, 0.08)  # of the view's side, a frame
    turn = random.uniform(4, 8)  # degrees a frame
    reach = 1 + speed * frames if kind == "zoom" else 1.0
    room = 1.5 * reach + (speed * frames if kind == "pan" else 0)
    side = min(photo.size) / room * random.uniform(0.5, 1.0)
    margin = side * room / 2
    x, y = (random.uniform(margin, length - margin) for length in photo.size)
    out = []
    for k in range(frames):
        t = (k if forwards else frames - 1 - k) - (frames - 1) / 2
        a, b, scale, angle = x, y, 1.0, 0.0
        if kind == "pan":
            a, b = (x + t * speed * side, y) if way in ("left", "right") else (x, y + t * speed * side)
        elif kind == "zoom":
            scale = 1 + t * speed
        else:
            angle = np.deg2rad(t * turn)
        step, c, s = scale * side / size, np.cos(angle), np.sin(angle)
        half = (size - 1) / 2
        # a pixel (u, v) of the view is (a, b) + step * rotation of (u - half, v - half) of the photograph
        matrix = (
            step * c,
            -step * s,
            a - step * (c * half - s * half),
            step * s,
            step * c,
            b - step * (s * half + c * half),
        )
        big = photo.transform((size, size), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
        out.append(big)
    return out


def write(pictures: list[Image.Image], path: Path, kind: str) -> None:
    """A folder of PNGs, or a video file of that kind (path gets the suffix)."""
    if kind == "frames":
        path.mkdir(parents=True)
        for i, picture in enumerate(pictures):
            picture.save(path / f"{i:03d}.png")
        return
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path.with_suffix(f".{kind}")), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height = pictures[0].size
        stream.pix_fmt, stream.bit_rate, stream.codec_context.gop_size = "yuv420p", 4_000_000, 6
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())


def make(
    out: Path,
    clips: int = 40,
    frames: int = 12,
    size: int = 40,
    kind: str = "frames",
    seed: int = 0,
    motions: Sequence[str] = MOTIONS,
) -> Path:
    """`clips` of each motion in OUT/train, and a quarter of that in OUT/val."""
    photos = photographs()
    for part, number in (("train", clips), ("val", max(2, clips // 4))):
        for motion in motions:
            for i in range(number):
                random = np.random.default_rng(
                    [seed, part == "val", MOTIONS.index(motion) // 2, i]
                )  # alike for both motions of a pair
                photo = photos[i % len(photos)]
                split = round(photo.width * _TRAIN)
                box = (0, 0, split, photo.height) if part == "train" else (split, 0, photo.width, photo.height)
                pictures = clip(photo.crop(box), motion, frames, size, random)
                write(pictures, out / part / motion / f"{i:04d}", kind)
    return out


def main() -> None:
    """Read the command line and write the clips."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    for name, value in (("clips", 40), ("frames", 12), ("size", 40), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--format", choices=("frames", "mp4", "mkv"), default="frames")
    parser.add_argument("--motions", type=lambda text: text.split(","), default=MOTIONS)
    a = parser.parse_args()
    make(a.out, a.clips, a.frames, a.size, a.format, a.seed, a.motions)


if __name__ == "__main__":
    main()
