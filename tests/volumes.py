"""Real volumes that packages ship: nibabel's small brain scan, and nilearn's MNI152 template with its tissue maps.

The template (Fonov et al., 2011, "Unbiased average age-appropriate atlases for pediatric studies") is the mean T1 scan of 152
brains at 1 mm; its grey and white matter are maps of probability from the same project. The labels below are their argmax:
0 neither, 1 grey matter, 2 white matter. It was made symmetric, so that its left and right are no two samples: parts are
taken from the front and from the back.
"""

import importlib.util
from pathlib import Path

import nibabel
import nibabel.testing
import numpy as np

ANATOMICAL = Path(nibabel.testing.data_path) / "anatomical.nii"
"""33 x 41 x 25 voxels of 2 mm."""

FOUR_D = Path(nibabel.testing.data_path) / "example_nifti2.nii.gz"
"""32 x 20 x 12 voxels of 2 x 2 x 2.2 mm, at two times."""

TINY = [
    "backbone.in_chans=1",
    "backbone.embed_dim=24",
    "backbone.depth=4",
    "backbone.num_heads=2",
    "backbone.patch_size=4",
]
RUN = [
    *TINY, "backbone=vit3d_tiny", "global_batch=2", "steps=2", "epochs=null", "workers=0", "threads=1", "precision=fp32",
    "optimizer.warmup=0 steps", "tensorboard=false", "report=false", "device=cpu", "log_every=1",
]  # fmt: skip


def _template(kind: str) -> np.ndarray:
    """[X, Y, Z] uint8 of every third millimetre."""
    spec = importlib.util.find_spec("nilearn")
    assert spec is not None and spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0]) / "datasets" / "data"
    path = folder / f"mni_icbm152_{kind}_tal_nlin_sym_09a_converted.nii.gz"
    return np.asanyarray(nibabel.load(path).dataobj)[::3, ::3, ::3]


def build(root: Path, margin: int = 10) -> Path:
    """ROOT/{train,val}/{images,masks}/*.nii.gz: the brain's front in two parts and its back in one, 3 mm a voxel."""
    t1, grey, white = (_template(kind).astype(np.int16) for kind in ("t1", "gm", "wm"))
    labels = np.where(np.maximum(grey, white) < 128, 0, np.where(white > grey, 2, 1)).astype(np.uint8)
    inside = (slice(margin // 2, -(margin // 2)), slice(None), slice(margin, -margin))
    for part, name, rows in (("train", "a", slice(48, 70)), ("train", "b", slice(28, 48)), ("val", "c", slice(6, 28))):
        for kind, array in (("images", t1), ("masks", labels)):
            path = root / part / kind / f"{name}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(array[:, rows][inside], np.diag([3.0, 3.0, 3.0, 1.0])), path)
    return root
