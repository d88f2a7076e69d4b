"""Features of all images of a folder, to a table or an array.

python examples/features.py RUN IMAGES OUT.parquet    columns path and feature (list of float32); needs pyarrow
python examples/features.py RUN IMAGES OUT.npy        array [N, D], and OUT.txt with a path a line
"""

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import selfsup

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


def read(path: Path, model) -> torch.Tensor:
    """[C, H, W], normalised."""
    h, w = model.image_size
    pixels = Image.open(path).convert("L" if model.in_chans == 1 else "RGB").resize((w, h), Image.Resampling.BICUBIC)
    x = torch.from_numpy(np.array(pixels, dtype=np.float32).reshape(h, w, -1)).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (model.mean, model.std))
    return (x - mean) / std


@torch.inference_mode()
def main(run: str, images: str, out: str, batch: int = 64) -> None:
    model, root = selfsup.load_backbone(run), Path(images)
    paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        sys.exit(f"{root}: no images")
    features = np.empty((len(paths), model.embed_dim), dtype=np.float32)
    for start in range(0, len(paths), batch):
        part = torch.stack([read(path, model) for path in paths[start : start + batch]])
        features[start : start + batch] = model(part).pooled.numpy()
    names = [path.relative_to(root).as_posix() for path in paths]
    if out.endswith(".parquet"):
        import pyarrow
        import pyarrow.parquet

        column = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(features.ravel()), features.shape[1])
        pyarrow.parquet.write_table(pyarrow.table({"path": names, "feature": column}), out)
    else:
        np.save(out, features)
        Path(out).with_suffix(".txt").write_text("".join(f"{name}\n" for name in names))
    print(f"{out}: {features.shape[0]} images, {features.shape[1]} numbers each")


if __name__ == "__main__":
    main(*sys.argv[1:])
