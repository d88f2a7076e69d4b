"""A small set of composed pictures with boxes for the tests of detection."""

from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks import composed_boxes


def build(folder: Path, train: int = 8, val: int = 4, size: int = 64) -> Path:
    """FOLDER/train/images, boxes.json, voc, yolo, and the same in FOLDER/val."""
    return composed_boxes.build(folder, train, val, size)


def image(path: Path, height: int = 40, width: int = 60) -> Path:
    """A grey one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((height, width, 3), 90, np.uint8)).save(path)
    return path
