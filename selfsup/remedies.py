"""What to change in a run that is not well: by what is wrong, in the words of its method.

Sources of what is said of a method: Caron et al., 2021 (DINO), section 5.3: what sharpening and centring keep away; Caron et
al., 2020 (SwAV) and their published code: frozen prototypes for stability, a smaller epsilon, fewer prototypes or a shorter queue
where the loss stays at ln K; Assran et al., 2022 (MSN), section 3: sharpening, and the entropy of the mean prediction; Wang &
Liu, 2021 ("Understanding the Behaviour of Contrastive Loss"): a lower temperature spreads features; Chen & He, 2021 (SimSiam):
a predictor that keeps its learning rate; Grill et al., 2020 (BYOL), section 5: a target that follows at once destabilises; Chen
et al., 2021 (MoCo v3), section 4: the frozen patch projection. What weighs the terms of Barlow Twins, VICReg and LeJEPA follows
from their losses.
"""

import re
from collections.abc import Mapping
from typing import Any

SEEN = {
    "collapse: uniform": "the teacher's output is uniform",
    "collapse: constant": "every image gets the same prototype",
    "collapse: features": "features no longer depend on the image",
    "diverges": "",
    "refuses steps": "loss or gradients were not finite; selfsup replay RUN/refused shows where",
    "flat loss": "nothing is learned",
    "starves for data": "",
}
"""What is the matter, by kind. RUN stands for the run's folder."""

ALWAYS = {
    "collapse: uniform": "lower the learning rate",
    "collapse: constant": "lower the learning rate",
    "collapse: features": "lower the learning rate, warm it up for longer, check the crops",
    "diverges": "lower the learning rate, warm it up for longer, clip gradients; a new run with init_from=RUN goes on from here",
    "refuses steps": "lower the learning rate, or use precision=fp32",
    "flat loss": "check the learning rate and its warm-up, and what is frozen",
    "starves for data": "raise workers; store smaller images, on a local disk; selfsup doctor DATA tells what an image costs",
}
"""What helps any method."""

_SHARPER = "lower method.teacher_temp, or warm it up for longer: method.warmup_teacher_temp, method.teacher_temp_warmup"
_FREEZE = "keep the prototypes frozen for longer: method.freeze_last_layer"
_NEGATIVES = "lower method.temperature, or raise global_batch: there are more images to differ from"
_ALIKE = "lower method.temperature, check that the views differ and are of the same image"
_SOONER = "freeze prototypes for a shorter time (method.freeze_last_layer), use fewer (method.out_dim), lower method.teacher_temp"

OF_METHOD: Mapping[str, Mapping[str, str]] = {
    "collapse: uniform": {
        "dino": _SHARPER,
        "ibot": _SHARPER,
        "dinov2": _SHARPER,
        "swav": "lower method.epsilon, or use fewer method.prototypes",
        "msn": "lower method.sharpening or method.temperature, or raise method.entropy_weight",
        "capi": "lower method.target_temp and method.cluster_temp",
    },
    "collapse: constant": {
        "dino": "lower method.center_momentum, so that the centre follows the teacher, or raise method.teacher_temp",
        "ibot": "lower method.center_momentum and method.patch_center_momentum, so that the centres follow the teacher, or raise "
        "method.teacher_temp",
        "dinov2": "use more method.sinkhorn_iterations, or raise global_batch, over which prototypes are balanced",
        "swav": "raise method.epsilon, use more method.sinkhorn_iterations, or freeze for longer: method.freeze_prototypes",
        "msn": "raise method.mean_entropy_weight, or balance the targets with method.sinkhorn=3",
        "capi": "use more iterations of method.sinkhorn, raise method.target_temp or global_batch",
    },
    "collapse: features": {
        "dino": "raise method.momentum, so that the teacher moves slowly",
        "ibot": "raise method.momentum, so that the teacher moves slowly",
        "dinov2": "raise method.koleo_weight, which keeps images apart, and method.momentum",
        "swav": "freeze prototypes for longer: method.freeze_prototypes",
        "msn": "raise method.mean_entropy_weight and method.momentum",
        "capi": "raise method.momentum, or warm it up for longer: method.momentum_warmup",
        "byol": "raise method.momentum, so that the teacher moves slowly",
        "ijepa": "raise method.momentum, so that the teacher moves slowly, or predict larger blocks: method.target_scale",
        "simsiam": "use method.fix_predictor_lr=true, so that the predictor follows",
        "simclr": _NEGATIVES,
        "supcon": _NEGATIVES,
        "mocov3": _NEGATIVES,
        "moco": "lower method.temperature, raise method.queue_length: there are more keys to differ from; raise method.momentum",
        "barlow_twins": "raise method.redundancy, which keeps dimensions apart, and global_batch",
        "vicreg": "raise method.variance, which keeps images apart, against method.invariance; method.covariance does it for "
        "dimensions",
        "lejepa": "raise method.regularisation, which keeps features spread",
    },
    "diverges": {
        "dino": _FREEZE,
        "ibot": _FREEZE,
        "dinov2": _FREEZE,
        "swav": "keep the prototypes frozen for longer: method.freeze_prototypes; raise method.epsilon",
        "capi": "warm the teacher up for longer: method.momentum_warmup",
        "mocov3": "of a ViT, freeze the patches' projection: method.freeze_patch_projection=true; raise method.momentum",
        "moco": "raise method.momentum: keys in the queue are of teachers that differ much",
        "barlow_twins": "lower method.redundancy, or method.bias_lr",
        "simclr": "raise method.temperature",
        "supcon": "raise method.temperature",
        "lejepa": "lower method.regularisation",
    },
    "flat loss": {
        "dino": _SOONER,
        "ibot": _SOONER,
        "dinov2": _SOONER,
        "swav": "lower method.epsilon, use fewer method.prototypes or a shorter method.queue_length",
        "msn": "lower method.mask_ratio, method.sharpening or method.mean_entropy_weight",
        "capi": "lower method.target_temp; use fewer method.clusters; end method.momentum_warmup sooner",
        "simclr": _ALIKE,
        "mocov3": _ALIKE,
        "moco": "lower method.temperature; while the queue fills (method.queue_length) its loss does not fall",
        "supcon": "lower method.temperature, check the labels",
        "byol": "lower method.momentum: the teacher hardly moves; check that the views differ",
        "simsiam": "check that the views differ, and method.predictor_dim",
        "barlow_twins": "lower method.redundancy, whose terms outweigh that of the views; check that the views differ",
        "vicreg": "raise method.invariance against method.variance; check that the views differ",
        "lejepa": "lower method.regularisation, which outweighs the views; check that they differ",
        "ijepa": "predict smaller blocks (method.target_scale) from more context (method.context_scale)",
        "mae": "the decoder guesses the mean (with method.norm_pix=true a loss of 1): lower method.mask_ratio, use smaller "
        "patches or larger views",
        "simmim": "the prediction is the mean: lower method.mask_ratio, or hide smaller squares: method.mask_patch_size",
        "supervised": "check the labels; lower method.label_smoothing",
        "deit": "check labels and teacher; lower method.label_smoothing",
        "distill": "check the teacher, and the weights of method.losses",
        "byot": "check the labels; lower method.label_smoothing",
    },
}
"""What helps a method besides, in its own keys. Of a method from elsewhere nothing is known."""

_KNOBS: Mapping[str, tuple[str, ...]] = {
    "collapse: uniform": ("optimizer.lr", "optimizer.base_lr"),
    "collapse: constant": ("optimizer.lr", "optimizer.base_lr"),
    "collapse: features": ("optimizer.lr", "optimizer.base_lr", "optimizer.warmup", "views.global.scale"),
    "diverges": ("optimizer.lr", "optimizer.base_lr", "optimizer.warmup", "optimizer.clip"),
    "refuses steps": ("precision", "optimizer.lr", "optimizer.base_lr"),
    "flat loss": ("optimizer.lr", "optimizer.base_lr", "optimizer.warmup"),
    "starves for data": ("workers", "global_batch"),
}
_KEY = re.compile(r"\bmethod\.[a-z_]+|\bglobal_batch\b")


def advice(kind: str, method: str | None = None) -> str:
    """What to change, for a kind of SEEN, in a run of this method."""
    own = OF_METHOD.get(kind, {}).get(method or "", "")
    return "; ".join(part for part in (SEEN.get(kind, ""), own, ALWAYS.get(kind, "")) if part)


def method_of(config: Mapping[str, Any]) -> str | None:
    """The method's name in a run's config.yaml as it is; None if it does not say."""
    section = config.get("method")
    name = section.get("name") if isinstance(section, Mapping) else section
    return name if isinstance(name, str) else None


def knobs(kind: str, config: Mapping[str, Any]) -> str:
    """The keys that the advice for `kind` is about, as a run's config.yaml has them: 'workers=2 global_batch=64'."""
    own = _KEY.findall(OF_METHOD.get(kind, {}).get(method_of(config) or "", ""))
    shown = []
    for key in dict.fromkeys((*own, *_KNOBS.get(kind, ()))):
        value: Any = config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is not None:
            shown.append(f"{key}={value}")
    if any(word.startswith("optimizer.lr=") for word in shown):  # which leaves base_lr without effect
        shown = [word for word in shown if not word.startswith("optimizer.base_lr=")]
    return " ".join(shown)
