"""A small set of composed pictures, and small colour backbones, for the tests of segmentation."""

from pathlib import Path

from benchmarks import composed
from selfsup import config
from selfsup.backbones import create_backbone, export_timm

VIT = {
    "name": "vit_tiny_patch16_224",
    "img_size": 48,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 4,
    "num_heads": 2,
    "dynamic_img_size": True,
}
CONV = {
    "name": "resnetv2_50",
    "layers": [1, 1, 1],
    "channels": [16, 32, 48],
    "stem_chs": 8,
    "norm_layer": "groupnorm1",
}


def backbone(**options):
    """With random weights, in eval mode."""
    spec = config.BackboneConfig(**options)
    return create_backbone(spec, mean=(0.45,) * 3, std=(0.25,) * 3, input_size=48).eval()


def exported(folder: Path, **options) -> Path:
    """The same as a folder that is a target."""
    export_timm(backbone(**options), folder)
    return folder


def build(folder: Path, train: int = 8, val: int = 4, size: int = 48) -> Path:
    """OUT/train/images, OUT/train/masks, OUT/val/..."""
    return composed.build(folder, train, val, size)
