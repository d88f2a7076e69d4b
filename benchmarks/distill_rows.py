"""The rows of `distill.py`: what all have in common, and what each changes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

GROUPS = {
    "teachers": "Teachers: wider nets, trained once",
    "kd": "Distillation: a narrow ResNet-18 with labels, with its teacher's logits, and with each further loss added",
    "deit": "DeiT: a small ViT with labels, and with a distillation token",
    "byot": "Self-distillation: the narrow ResNet-18 with exits after each stage",
    "tricks": "Supervised: from plain SGD to all tricks, each added to those above it (Bag of Tricks, He et al., 2019)",
    "more": "Supervised: one more trick each, on top of label smoothing",
}

BATCH = 128
BASE: dict[str, Any] = {
    "data": {"mean": [0.286], "std": [0.353]},
    "backbone": {"name": "resnet18", "in_chans": 1},
    "method": {"name": "supervised"},
    "global_batch": BATCH,
    "precision": "fp32",
    "device": "cpu",
    "threads": 1,
    "workers": 0,
    "log_every": 50,
    "tensorboard": False,
    "optimizer": {
        "name": "sgd",
        "nesterov": True,
        "momentum": 0.9,
        "base_lr": 0.1,
        "min_lr": 0.0,
        "warmup": "5%",
        "schedule": "cosine",
        "weight_decay": 0.0005,
        "weight_decay_end": None,
        "clip": None,
    },
    "views": {
        "global": {
            "count": 1,
            "size": 28,
            "scale": [0.6, 1.0],
            "ratio": [0.8, 1.25],
            "interpolation": "bilinear",
            "jitter": 0.0,
            "grayscale": 0.0,
            "blur": 0.0,
            "solarize": 0.0,
        },
        "local": {"count": 0},
    },
    "checkpoint": {"every": 100000, "keep_last": 1},
}
"""The recipe that every row starts from."""

NARROW = {"backbone.channels": [16, 32, 64, 128]}
WIDE = {"backbone.name": "resnet18d", "backbone.channels": [48, 96, 192, 384]}
MIDDLE = {"backbone.channels": [24, 48, 96, 192]}
VIT = {
    "backbone.img_size": 28,
    "backbone.patch_size": 4,
    "backbone.embed_dim": 96,
    "backbone.depth": 4,
    "backbone.num_heads": 3,
    "optimizer.name": "adamw",
    "optimizer.nesterov": False,
    "optimizer.lr": 0.001,
    "optimizer.weight_decay": 0.05,
}


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    group: str
    title: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Of the recipe, with dotted keys."""
    against: str | None = None
    """The row its gain is told over."""
    teacher: str | None = None
    """The row whose run (seed 0) is its teacher."""
    times: float = 1.0
    """Of the budget; 1 for everything that is compared."""


def _kd() -> list[Row]:
    """Student, + soft logits, + each other loss beside the soft logits; other losses between logits in their place.

    Weights are such that each added loss begins at about the size of the others. None was chosen by its accuracy.
    """

    def row(name: str, title: str, losses: Mapping[str, float], more: Mapping[str, Any], against: str) -> Row:
        weights = {f"method.losses.{key}": value for key, value in losses.items()}
        options = {**NARROW, "method.name": "distill", "method.temperature": 4.0, **weights, **more}
        return Row(name, "kd", title, options, against, "teacher")

    soft = {"ce": 0.5, "soft": 0.5}
    second = {"method.layers": "layer2", "method.teacher_layers": "layer2"}
    both = {"method.layers": ["layer1", "layer2"], "method.teacher_layers": ["layer1", "layer2"]}
    return [
        Row("student", "kd", "labels alone", NARROW),
        row("kd", "labels and soft logits, T = 4 (Hinton)", soft, {}, "student"),
        row("kd_hint", "kd + hints after layer2 (FitNets)", {**soft, "hint": 1.0}, second, "kd"),
        row("kd_at", "kd + attention transfer", {**soft, "at": 100.0}, both, "kd"),
        row("kd_sp", "kd + similarity of images (SP)", {**soft, "sp": 1000.0}, second, "kd"),
        row(
            "kd_rkd",
            "kd + relations (RKD, distance and angle)",
            {**soft, "rkd_distance": 1.0, "rkd_angle": 2.0},
            {},
            "kd",
        ),
        row("kd_crd", "kd + contrastive (CRD, in the batch)", {**soft, "crd": 0.01}, {}, "kd"),
        row("kd_regression", "kd + regression of the last map", {**soft, "regression": 1.0}, {}, "kd"),
        row("dkd", "labels and decoupled logits (DKD)", {"ce": 0.5, "dkd": 0.5}, {"method.dkd_beta": 2.0}, "kd"),
        row("dist", "labels and correlations (DIST)", {"ce": 0.5, "dist": 1.0}, {}, "kd"),
    ]


def _deit() -> list[Row]:
    token = {**VIT, "backbone.name": "deit_tiny_distilled_patch16_224", "method.name": "deit"}
    soft = {"method.distillation": "soft", "method.alpha": 0.1, "method.temperature": 3.0}
    return [
        Row(
            "vit",
            "deit",
            "labels alone",
            {**VIT, "backbone.name": "deit_tiny_patch16_224", "method.label_smoothing": 0.1},
        ),
        Row(
            "deit_hard",
            "deit",
            "token, the teacher's decisions",
            {**token, "method.distillation": "hard"},
            "vit",
            "teacher",
        ),
        Row("deit_soft", "deit", "token, the teacher's distribution", {**token, **soft}, "vit", "teacher"),
    ]


def _byot() -> list[Row]:
    def row(name: str, title: str, **options: float) -> Row:
        given = {f"method.{key}": value for key, value in options.items()}
        return Row(name, "byot", title, {**NARROW, "method.name": "byot", **given}, "student")

    return [
        row("exits", "exits that learn from labels alone", alpha=0.0, feature_weight=0.0),
        row("byot_logits", "and from the deepest exit's logits", alpha=0.5, temperature=3.0, feature_weight=0.0),
        row("byot", "and from its features", alpha=0.5, temperature=3.0, feature_weight=0.001),
    ]


def _tricks() -> list[Row]:
    """Cumulative. Section 3: efficient training; 4: the model; 5: refinements, in the order of table 6."""
    plain = {
        **MIDDLE,
        "global_batch": 64,
        "backbone.zero_init_last": False,
        "optimizer.warmup": "0%",
        "optimizer.decay_all": True,
        "optimizer.schedule": "step",
        "optimizer.milestones": ["25%", "50%", "75%"],
    }
    steps: list[tuple[str, str, dict[str, Any]]] = [
        ("large_batch", "+ batch 256, rate scaled in proportion", {"global_batch": 256}),
        ("warmup", "+ warm-up", {"optimizer.warmup": "4%"}),
        ("zero_gamma", "+ last norm of each block starts at 0", {"backbone.zero_init_last": True}),
        ("no_bias_decay", "+ no decay of biases and norms", {"optimizer.decay_all": False}),
        ("resnet_d", "+ ResNet-D", {"backbone.name": "resnet18d"}),
        ("cosine", "+ cosine decay", {"optimizer.schedule": "cosine", "optimizer.milestones": []}),
        ("smoothing", "+ label smoothing 0.1", {"method.label_smoothing": 0.1, "method.smoothing_form": "others"}),
    ]
    rows, options, before = (
        [Row("plain", "tricks", "SGD, batch 64, rate divided by 10 three times", plain)],
        plain,
        "plain",
    )
    for name, title, change in steps:
        options = {**options, **change}
        rows.append(Row(name, "tricks", title, options, before))
        if name == "no_bias_decay":
            title = "+ bf16 (this row alone: on CPUs it is no faster at this size)"
            rows.append(Row("low_precision", "tricks", title, {**options, "precision": "bf16"}, name))
        before = name
    distilled = {
        **options,
        "method.name": "distill",
        "method.temperature": 20.0,
        "method.losses.ce": 1.0,
        "method.losses.soft": 1.0,
    }
    mixup = {"mix.name": "mixup", "mix.mixup_alpha": 0.2}
    return [
        *rows,
        Row("distilled", "tricks", "+ distillation, T = 20", distilled, "smoothing", "teacher"),
        Row("mixup", "tricks", "+ mixup 0.2 instead", {**options, **mixup}, "smoothing"),
        Row("all_tricks", "tricks", "+ both: all tricks", {**distilled, **mixup}, "plain", "teacher"),
    ]


def _more() -> list[Row]:
    base = next(row for row in _tricks() if row.name == "smoothing").overrides
    changes: list[tuple[str, str, dict[str, Any]]] = [
        ("cutmix", "CutMix", {"mix.name": "cutmix", "mix.probability": 0.5}),
        ("ricap", "RICAP", {"mix.name": "ricap", "mix.probability": 0.5}),
        ("cutout", "Cutout, 8 pixels", {"views.global.cutout": 8}),
        ("erasing", "random erasing", {"views.global.erase": 0.25}),
        ("randaugment", "RandAugment, N = 1, M = 5", _randaugment()),
        ("stochastic_depth", "stochastic depth 0.1", {"backbone.drop_path_rate": 0.1}),
        ("averaged", "averaged weights", {"method.ema": 0.99}),
        ("adabound", "AdaBound", {"optimizer.name": "adabound", "optimizer.nesterov": False, "optimizer.lr": 0.001}),
    ]
    return [Row(name, "more", title, {**base, **change}, "smoothing") for name, title, change in changes]


def _randaugment() -> dict[str, Any]:
    return {"views.global.policy": "randaugment", "views.global.policy_ops": 1, "views.global.policy_magnitude": 5}


ROWS: list[Row] = [
    Row(
        "teacher",
        "teachers",
        "ResNet-18-D, nine times the student's parameters, three times the budget",
        WIDE,
        times=3.0,
    ),
    *_kd(),
    *_deit(),
    *_byot(),
    *_tricks(),
    *_more(),
]
