"""The smallest real runs: a folder of images, a tiny ViT, ten steps."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from selfsup.config import Config, load

TINY_VIT = [
    "backbone=vit_tiny_patch16_224",
    "backbone.img_size=32",
    "backbone.patch_size=8",
    "backbone.embed_dim=32",
    "backbone.depth=2",
    "backbone.num_heads=2",
    "backbone.dynamic_img_size=true",
]
TINY_RUN = [
    *TINY_VIT,
    "views.global.size=32",
    "views.local.size=16",
    "views.local.count=3",
    "global_batch=8",
    "steps=10",
    "workers=0",
    "threads=1",
    "tensorboard=false",
    "log_every=4",
    "checkpoint.every=100",
]
ONE_VIEW = ["views.global.count=1", "views.global.blur=0.5", "views.global.solarize=0.1"]
SECOND_STUDENT = (
    "method.students=[{name: small, layers: [0, 0], backbone: {name: vit_tiny_patch16_224, img_size: 32, patch_size: 16, "
    "embed_dim: 24, depth: 1, num_heads: 2, drop_path_rate: 0.1}}]"
)
METHOD_OPTIONS = {
    "barlow_twins": ["method.hidden_dim=48", "method.out_dim=32", "method.bias_lr=0.5"],
    "byol": ["method.hidden_dim=48", "method.out_dim=16"],
    "byot": ["method.feature_weight=0.01"],
    "capi": [
        "views.global.count=1",
        "views.global.blur=0",
        "views.global.solarize=0",
        "method.clusters=16",
        "method.predicted=0.5",
        "method.predictor_depth=2",
        "method.predictor_drop_path=0.1",
        "method.momentum_warmup=2 steps",
    ],
    "deit": [
        *ONE_VIEW,
        "teacher=tests.methods.tiny:tiny_teacher",
        "backbone=deit_tiny_distilled_patch16_224",
        "method.ema=0.9",
    ],
    "dino": [
        "method.out_dim=64",
        "method.hidden_dim=48",
        "method.bottleneck_dim=16",
        "method.freeze_last_layer=2 steps",
    ],
    "dinov2": [
        "method.out_dim=64",
        "method.patch_out_dim=48",
        "method.hidden_dim=48",
        "method.bottleneck_dim=16",
        "method.patch_bottleneck_dim=24",
        "method.gram_weight=2",
        "method.gram_start=2 steps",
        "method.gram_every=4 steps",
        "method.freeze_last_layer=2 steps",
        "method.teacher_temp_warmup=5 steps",
    ],
    "distill": [
        *ONE_VIEW,
        "teacher=tests.methods.tiny:tiny_teacher",
        "method.losses={ce: 1.0, soft: 1.0, hint: 0.1, patch_cosine: 0.1}",
        "method.layers=[0, 1]",
        "method.teacher_layers=[layer2, 3]",
        "method.ema=0.9",
        SECOND_STUDENT,
    ],
    "moco": ["method.hidden_dim=48", "method.out_dim=16", "method.queue_length=20", "method.momentum=0.9"],
    "mocov3": ["method.hidden_dim=48", "method.out_dim=16", "method.momentum=0.9"],
    "simclr": ["method.hidden_dim=48", "method.out_dim=16"],
    "supcon": ["method.hidden_dim=48", "method.out_dim=16"],
    "ijepa": [
        "views.global.count=1",
        "views.global.blur=0",
        "views.global.solarize=0",
        "method.predictor_dim=24",
        "method.predictor_depth=2",
        "method.min_context=4",
    ],
    "msn": [
        "method.prototypes=32",
        "method.hidden_dim=48",
        "method.output_dim=16",
        "method.head_batch_norm=false",
        "method.mask_ratio=0.4",
        "method.sinkhorn=3",
        "method.entropy_weight=0.1",
    ],
    "lejepa": ["method.hidden_dim=48", "method.out_dim=16", "method.slices=32"],
    "simsiam": ["method.hidden_dim=48", "method.out_dim=32", "method.predictor_dim=16"],
    "ibot": [
        "method.out_dim=64",
        "method.patch_out_dim=48",
        "method.hidden_dim=48",
        "method.bottleneck_dim=16",
        "method.freeze_last_layer=2 steps",
        "method.teacher_temp_warmup=5 steps",
    ],
    "mae": [
        "method.decoder_dim=24",
        "method.decoder_depth=2",
        "method.decoder_heads=3",
    ],
    "simmim": ["method.mask_patch_size=8"],
    "supervised": [
        "method.label_smoothing=0.1",
        "method.ema=0.9",
        "method.consistency=1.0",
        "method.consistency_warmup=0 steps",
    ],
    "swav": [
        "method.prototypes=24",
        "method.hidden_dim=48",
        "method.out_dim=16",
        "method.freeze_prototypes=2 steps",
        "method.queue_length=12",
        "method.queue_start=0 steps",
    ],
    "vicreg": ["method.hidden_dim=48", "method.out_dim=32"],
}
"""Options that make each method small, and all of it run; a new method adds its row."""


def tiny_config(method: str, *overrides: str) -> Config:
    """A configuration of ten tiny steps with this method."""
    return load(None, [*TINY_RUN, f"method={method}", *METHOD_OPTIONS[method], *overrides])


TEACHER_OPTIONS = {"channels": [8, 16, 16, 32], "stem_width": 8}


def tiny_teacher(classes: int = 4, seed: int = 100, drop_rate: float = 0.5) -> Any:
    """A backbone with batch norm, dropout and a classifier of its own; its running statistics are not the initial ones."""
    import timm
    import torch

    from selfsup.backbones.create import wrap

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = timm.create_model("resnet10t", num_classes=classes, drop_rate=drop_rate, **TEACHER_OPTIONS)
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.copy_(torch.rand(buffer.shape) * 0.5 + (0.75 if name.endswith("var") else -0.25))
        for name, parameter in model.named_parameters():
            if name.endswith("bn2.weight"):
                torch.nn.init.uniform_(parameter, 0.5, 1.5)  # 0 at first: blocks would do nothing
        torch.nn.init.normal_(model.fc.weight, std=0.5)  # answers that differ from image to image
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
    return wrap(model, "resnet10t", dict(TEACHER_OPTIONS), mean=mean, std=std, input_size=32, pos_interp="timm")


def write_images(folder: Path, count: int = 40, size: int = 40, seed: int = 0, classes: int = 0) -> Path:
    """Colourful PNGs with structure: gradients, discs and noise; in class folders if `classes`."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:size, 0:size] / size
    for i in range(count):
        a, b, c, r = rng.random(4)
        disc = ((x - b) ** 2 + (y - c) ** 2 < 0.1 * r + 0.02)[..., None]
        base = np.stack([a * x, b * y, c * (x + y) / 2], -1)
        image = np.where(disc, rng.random(3), base) + 0.05 * rng.standard_normal((size, size, 3))
        where = folder / f"class_{i % classes}" if classes else folder
        where.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image.clip(0, 1) * 255).astype(np.uint8)).save(where / f"image_{i:03d}.png")
    return folder


def cli(*arguments: str, processes: int = 1, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """`selfsup ...` in new processes, under torchrun if more than one."""
    command = [sys.executable, "-m"]
    if processes > 1:
        command += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    return subprocess.run(
        [*command, "selfsup.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **(env or {})},
    )
