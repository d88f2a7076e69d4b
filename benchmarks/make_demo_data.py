"""Build the bundled demo images from the four original Fashion-MNIST files.

    python benchmarks/make_demo_data.py [--from /usr/share/datasets/fashion-mnist] [--out selfsup/data/fashion]

Writes train.zip (the first 10,000 training images) and val.zip (the first 2,000 test images): one PNG an image in ten
class folders whose sorted order is the data set's own label order. The same input gives the same files, byte for byte,
with the same zlib.
"""

import argparse
import gzip
import io
import struct
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = (
    "0_t-shirt", "1_trouser", "2_pullover", "3_dress", "4_coat",
    "5_sandal", "6_shirt", "7_sneaker", "8_bag", "9_ankle-boot",
)  # fmt: skip
SPLITS = {"train": ("train", 10_000), "val": ("t10k", 2_000)}


def read_idx(path: Path) -> np.ndarray:
    """An array from a gzipped IDX file (http://yann.lecun.com/exdb/mnist): magic, dimensions, uint8 values."""
    data = gzip.decompress(path.read_bytes())
    zero, kind, ndim = struct.unpack_from(">HBB", data)
    if (zero, kind) != (0, 8):
        raise SystemExit(f"{path}: not an IDX file of bytes")
    shape = struct.unpack_from(f">{ndim}I", data, 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * ndim).reshape(shape)


def png(image: np.ndarray) -> bytes:
    """A [H,W] uint8 image as the smallest PNG that PIL writes."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def write_split(images: np.ndarray, labels: np.ndarray, path: Path) -> None:
    """Images [N,28,28] and labels [N] into class folders inside a stored (uncompressed) zip."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for i in np.lexsort((np.arange(len(labels)), labels)):
            entry = zipfile.ZipInfo(f"{CLASSES[labels[i]]}/{i:05d}.png", date_time=(1980, 1, 1, 0, 0, 0))
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, png(images[i]))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="source", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "selfsup/data/fashion")
    args = parser.parse_args()
    for split, (stem, count) in SPLITS.items():
        images = read_idx(args.source / f"{stem}-images-idx3-ubyte.gz")[:count]
        labels = read_idx(args.source / f"{stem}-labels-idx1-ubyte.gz")[:count]
        out = args.out / f"{split}.zip"
        write_split(images, labels, out)
        print(f"{out}: {len(images)} images, {out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
