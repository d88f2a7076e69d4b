"""Real image files for tests, made from the bundled Fashion-MNIST images."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import selfsup.data

DEMO = Path(selfsup.data.__file__).parent / "fashion"


@pytest.fixture(scope="session")
def pictures():
    """60 colour images [64,80,3] with real edges: three grey pictures each, enlarged and coloured."""
    with zipfile.ZipFile(DEMO / "val.zip") as archive:
        names = archive.namelist()[:: len(archive.namelist()) // 180][:180]
        grey = [Image.open(io.BytesIO(archive.read(n))).resize((80, 64), Image.Resampling.BICUBIC) for n in names]
    return [np.stack([np.asarray(g) for g in grey[3 * i : 3 * i + 3]], axis=-1) for i in range(60)]


@pytest.fixture(scope="session")
def flat_folder(tmp_path_factory, pictures):
    """A flat folder of 40 JPEGs of several sizes."""
    root = tmp_path_factory.mktemp("flat")
    for i, picture in enumerate(pictures[:40]):
        image = Image.fromarray(picture)
        image.resize((60 + i, 90 - i)).save(root / f"{i:03d}.jpg", quality=90)
    return root
