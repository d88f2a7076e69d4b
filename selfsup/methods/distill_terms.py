"""The losses of `method=distill`: which outputs each needs, the projectors it learns, and their sum for one student."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from selfsup.config import Positive, Section
from selfsup.errors import UserError
from selfsup.heads import DINOHead
from selfsup.losses.classification import Smoothing, soft_cross_entropy
from selfsup.losses.contrastive import crd_in_batch
from selfsup.losses.dino import dino_loss, teacher_probabilities
from selfsup.losses.hints import attention_transfer, feature_regression, hint_loss, to_grid
from selfsup.losses.logits import (
    decoupled_distillation,
    dist_loss,
    hard_distillation,
    soft_distillation,
    topk_distillation,
)
from selfsup.losses.relations import rkd_angle, rkd_distance, similarity_preserving
from selfsup.methods.contract import ViewBatch
from selfsup.methods.crd_memory import CRDMemory
from selfsup.methods.outputs import Layer, Outputs, Wanted

Weight = Annotated[float, Field(ge=0)]
Temperature = Annotated[float, Field(gt=0)]


class LossWeights(Section):
    """Weight of each loss; 0: it is left out. Given ones replace the defaults as a whole."""

    ce: Weight = 0.0
    """Cross-entropy with the labels."""
    soft: Weight = 0.0
    """T^2 KL between softened distributions (Hinton et al., 2015)."""
    hard: Weight = 0.0
    """Cross-entropy with the teacher's decision."""
    dkd: Weight = 0.0
    """Decoupled distillation (Zhao et al., 2022)."""
    dist: Weight = 0.0
    """Correlation of predictions, between and within classes (Huang et al., 2022)."""
    hint: Weight = 0.0
    """Maps after `layers`, projected (FitNets, Romero et al., 2015)."""
    at: Weight = 0.0
    """Attention maps of `layers` (Zagoruyko & Komodakis, 2017)."""
    sp: Weight = 0.0
    """Similarity of images in the maps of `layers` (Tung & Mori, 2019)."""
    rkd_distance: Weight = 0.0
    """Relations of pooled features (Park et al., 2019)."""
    rkd_angle: Weight = 0.0
    crd: Weight = 0.0
    """Contrastive, of pooled features (Tian et al., 2020); `crd_negatives` says against what. Published with a memory: 0.8."""
    regression: Weight = 0.0
    """The last map, projected."""
    cls_cosine: Weight = 0.0
    """Cosine of the CLS tokens, projected; a student without one uses its pooled feature."""
    patch_cosine: Weight = 0.0
    """Cosine of the last map, projected."""
    prototypes: Weight = 0.0
    """DINO's loss, all pairs of views, with the prototypes of a frozen DINO teacher."""

    @property
    def on(self) -> dict[str, float]:
        """Name -> weight of those that count."""
        return {name: value for name, value in self.model_dump().items() if value > 0}


class TermOptions(Section):
    """Options of the losses."""

    losses: LossWeights = LossWeights(ce=1.0, soft=1.0)
    temperature: Temperature = 4.0
    """Of soft."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Of ce."""
    smoothing_form: Smoothing = "all"
    """all: eps / K to each of the K classes; others: eps / (K - 1) to each but the label's own."""
    dkd_alpha: Weight = 1.0
    dkd_beta: Weight = 8.0
    dkd_temperature: Temperature = 4.0
    dist_beta: Weight = 1.0
    dist_gamma: Weight = 1.0
    dist_temperature: Temperature = 1.0
    layers: Layer | tuple[Layer, ...] = ()
    """Of the student, for hint, at and sp: numbers (negative from the end) or timm's names; default the last."""
    teacher_layers: Layer | tuple[Layer, ...] = ()
    """Of the teacher, each for the student's at the same place; default the last."""
    at_squared: bool = True
    """Mean of squares, as in the published code (its weight is 1000), or the length of the difference, as printed."""
    regression_distance: Literal["mse", "smooth_l1", "cosine"] = "smooth_l1"
    regression_normalise: Literal["none", "length", "whiten"] = "none"
    regression_beta: Annotated[float, Field(gt=0)] = 1.0
    """Of smooth_l1."""
    crd_dim: Positive = 128
    crd_temperature: Temperature = 0.07
    crd_negatives: Annotated[int, Field(ge=0)] = 0
    """0: an image is told from the others of its micro-batch. N: from N rows of a memory of all M training images (16384 in
    the published code), of 2 M crd_dim numbers, which are in the checkpoint."""
    hidden_dim: Positive = 2048
    """Of the student's head on the teacher's prototypes, with the two below."""
    bottleneck_dim: Positive = 256
    head_layers: Positive = 3
    student_temp: Temperature = 0.1
    """Of prototypes."""
    teacher_temp: Temperature | None = None
    """Of prototypes; null: the one that the teacher's run ended with."""


NEED_LABELS = ("ce", "dkd")
LOGITS = ("soft", "hard", "dkd", "dist")
"""Losses between logits."""
LAYERED = ("hint", "at", "sp")
"""Losses between maps of `layers`."""
RELATIONS = {"dist": 2, "rkd_distance": 2, "rkd_angle": 3, "sp": 2, "crd": 2}
"""Losses between the images of a micro-batch, and how many images each needs."""
_OUTPUTS = {
    **dict.fromkeys(LOGITS, "logits"),
    **dict.fromkeys(("rkd_distance", "rkd_angle", "crd"), "pooled"),
    **dict.fromkeys(("regression", "patch_cosine"), "patches"),
    "cls_cosine": "cls",
    "prototypes": "prototypes",
}


def wanted_of(losses: LossWeights, layers: Sequence[Layer] = ()) -> tuple[Wanted, dict[str, str]]:
    """(what the teacher must give, name of an output -> the option that needs it)."""
    why = {_OUTPUTS[name]: f"method.losses.{name}" for name in losses.on if name in _OUTPUTS}
    layered = any(name in LAYERED for name in losses.on)
    return Wanted(**dict.fromkeys(why, True), layers=tuple(layers) if layered else ()), why


def as_tuple(layers: Layer | tuple[Layer, ...]) -> tuple[Layer, ...]:
    """One layer or several."""
    return layers if isinstance(layers, tuple) else (layers,)


def has_head(losses: LossWeights) -> bool:
    """Whether the student needs one that tells classes."""
    return any(name in (*NEED_LABELS, *LOGITS) for name in losses.on)


class Terms(nn.Module):
    """The losses of one student, with what they learn: 1x1 convolutions and linear layers to the teacher's width."""

    def __init__(
        self, options: TermOptions, student: Outputs, teacher: Outputs, temperature: float | None, seed: int
    ) -> None:
        """student, teacher: what each gives for one image, for the shapes. temperature: of the teacher's prototypes."""
        super().__init__()
        self.options, self.weights = options, options.losses.on
        self.teacher_temp = options.teacher_temp or temperature or 0.04
        self.projectors = nn.ModuleDict()
        on = self.weights
        for i, (ours, theirs) in enumerate(zip(student.maps, teacher.maps, strict=True)):
            if "hint" in on or "at" in on:
                _check_grids(ours, theirs, i, "at" in on)
            if "hint" in on:
                self.projectors[f"hint{i}"] = nn.Conv2d(ours.shape[1], theirs.shape[1], 1)
        for name in ("regression", "patch_cosine"):
            if name in on:
                ours, theirs = _given(student.patches), _given(teacher.patches)
                _check_grids(ours, theirs, None, False)
                self.projectors[name] = nn.Conv2d(ours.shape[1], theirs.shape[1], 1)
        if "cls_cosine" in on:
            self.projectors["cls_cosine"] = nn.Linear(_token(student).shape[1], _given(teacher.cls).shape[1])
        if "crd" in on:
            self.projectors["crd"] = nn.Linear(_given(student.pooled).shape[1], options.crd_dim)
            self.projectors["crd_teacher"] = nn.Linear(_given(teacher.pooled).shape[1], options.crd_dim)
        self.memory: CRDMemory | None = None
        if "crd" in on and options.crd_negatives:
            self.memory = CRDMemory(options.crd_dim, options.crd_negatives, options.crd_temperature, seed)
        if "prototypes" in on:
            self.projectors["prototypes"] = DINOHead(
                _given(student.pooled).shape[1],
                _given(teacher.prototypes).shape[1],
                hidden_dim=options.hidden_dim,
                bottleneck_dim=options.bottleneck_dim,
                layers=options.head_layers,
            )

    def forward(
        self, s: Outputs, t: Outputs, batch: ViewBatch, local: Tensor | None, labels: Tensor, targets: Tensor | None
    ) -> dict[str, Tensor]:
        """Name -> loss (not weighted) of student s and teacher t, both of the batch's global views, [views * B].

        local: the student's pooled features of the local views, [L * B, D]. labels: int64 [views * B]. targets: what they
        say of each class, mixed and smoothed, [views * B, K].
        """
        o, p, out, views = self.options, self.projectors, {}, batch.images[0].shape[0]
        for name in self.weights:
            if name == "ce":
                out[name] = soft_cross_entropy(_given(s.logits), _given(targets))
            elif name == "soft":
                out[name] = soft_term(_given(s.logits), t, o.temperature)
            elif name == "hard":
                out[name] = hard_term(_given(s.logits), t)
            elif name == "dkd":
                out[name] = decoupled_distillation(
                    _given(s.logits), _given(t.logits), labels, o.dkd_alpha, o.dkd_beta, o.dkd_temperature
                )
            elif name == "dist":
                out[name] = dist_loss(_given(s.logits), _given(t.logits), o.dist_beta, o.dist_gamma, o.dist_temperature)
            elif name == "hint":
                pairs = [_same_grid(p[f"hint{i}"](a), b) for i, (a, b) in enumerate(zip(s.maps, t.maps, strict=True))]
                out[name] = _mean([hint_loss(a, b) for a, b in pairs])
            elif name == "at":
                pairs = [_same_grid(a, b) for a, b in zip(s.maps, t.maps, strict=True)]
                out[name] = _mean([attention_transfer(a, b, o.at_squared) for a, b in pairs])
            elif name == "sp":
                out[name] = _mean([similarity_preserving(a, b) for a, b in zip(s.maps, t.maps, strict=True)])
            elif name == "rkd_distance":
                out[name] = rkd_distance(_given(s.pooled), _given(t.pooled))
            elif name == "rkd_angle":
                out[name] = rkd_angle(_given(s.pooled), _given(t.pooled))
            elif name == "crd":
                ours, theirs = _unit(p["crd"](_given(s.pooled))), _unit(p["crd_teacher"](_given(t.pooled)))
                if self.memory is None:
                    out[name] = crd_in_batch(ours, theirs, o.crd_temperature)
                else:
                    out[name] = self.memory(ours, theirs, batch)
            elif name == "regression":
                a, b = _same_grid(p[name](_given(s.patches)), _given(t.patches))
                out[name] = feature_regression(a, b, o.regression_distance, o.regression_normalise, o.regression_beta)
            elif name == "patch_cosine":
                a, b = _same_grid(p[name](_given(s.patches)), _given(t.patches))
                out[name] = feature_regression(a, b, "cosine")
            elif name == "cls_cosine":
                out[name] = feature_regression(p[name](_token(s)), _given(t.cls), "cosine")
            elif name == "prototypes":
                z = _given(s.pooled) if local is None else torch.cat([_given(s.pooled), local])  # [V*B, D]
                size = _given(s.pooled).shape[0] // views
                z = p[name](z).unflatten(0, (-1, size))  # [V, B, K]
                q = _given(t.prototypes).unflatten(0, (views, size))  # [G, B, K], less the centre
                q = teacher_probabilities(q, q.new_zeros(()), self.teacher_temp)
                out[name] = dino_loss(z, q, o.student_temp, same_view=True)  # a frozen teacher: nothing can collapse
        return out

    def total(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum."""
        return torch.stack([self.weights[name] * value for name, value in parts.items()]).sum()


def soft_term(logits: Tensor, teacher: Outputs, temperature: float) -> Tensor:
    """Soft distillation from all of the teacher's logits, or from the largest where a cache has kept those alone."""
    if teacher.logits is not None:
        return soft_distillation(logits, teacher.logits, temperature)
    indices, values = _given(teacher.top_indices), _given(teacher.top_values)
    return topk_distillation(logits, indices, values, teacher.top_rest, temperature)


def hard_term(logits: Tensor, teacher: Outputs) -> Tensor:
    """Cross-entropy with the teacher's decision."""
    if teacher.logits is not None:
        return hard_distillation(logits, teacher.logits)
    return F.cross_entropy(
        logits if logits.dtype == torch.float64 else logits.float(), _given(teacher.top_indices)[:, 0]
    )


def _given(value: Tensor | None) -> Tensor:
    """What `wanted_of` has asked for."""
    assert value is not None
    return value


def _token(outputs: Outputs) -> Tensor:
    """CLS, or the pooled feature of a net without one: [N, D]."""
    return outputs.cls if outputs.cls is not None else _given(outputs.pooled)


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)


def _mean(values: list[Tensor]) -> Tensor:
    return torch.stack(values).mean()


def _same_grid(ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """Maps [N, D, h, w] on the smaller of the two grids: nothing is made up."""
    a, b = ours.shape[2:], theirs.shape[2:]
    size = (min(a[0], b[0]), min(a[1], b[1]))
    return to_grid(ours, size), to_grid(theirs, size)


def _check_grids(ours: Tensor, theirs: Tensor, pair: int | None, attention: bool) -> None:
    """Refuse maps that do not show the same part of an image, and attention over a single cell."""
    if ours.ndim != 4 or theirs.ndim != 4:
        raise UserError(
            "method.losses: those of patches compare maps of images; for clips and volumes use those of logits"
        )
    (h, w), (h2, w2) = ours.shape[2:], theirs.shape[2:]
    which = "the last maps" if pair is None else f"layers, teacher_layers: pair {pair}"
    if abs(h * w2 - w * h2) > max(h * w2, w * h2) / 4:
        raise UserError(
            f"method: {which} have grids of {h}x{w} (student) and {h2}x{w2} (teacher) cells, which are of different shapes; "
            "give views and teacher.size of one shape"
        )
    if attention and min(h * w, h2 * w2) < 2:
        raise UserError(
            f"method.losses.at: {which} have grids of {h}x{w} (student) and {h2}x{w2} (teacher) cells; attention over one cell "
            "says nothing: choose earlier layers, or larger views"
        )
