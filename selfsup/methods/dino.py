"""DINO: self-distillation with no labels (Caron et al., 2021, "Emerging Properties in Self-Supervised Vision Transformers").

The student sees all crops, the teacher (an EMA of the student, started from the same weights) the global ones. The
student learns to give every crop the distribution over prototypes that the teacher gives to another crop of the same
image. Centring and sharpening of the teacher's output keep it from collapsing. Algorithm 1 of the paper, in full.
"""

import copy
import math
from collections.abc import Mapping
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from selfsup import dist
from selfsup.backbones import Backbone
from selfsup.backbones.stochastic import key_stochastic_layers
from selfsup.config import Config, Duration, Positive, Probability, Section
from selfsup.data.views import View, multicrop
from selfsup.ema import ema_update
from selfsup.heads import DINOHead
from selfsup.losses.dino import teacher_health, teacher_probabilities
from selfsup.losses.numerics import at_least_float32
from selfsup.methods.contract import Labels, ViewBatch
from selfsup.methods.network import (
    Network,
    build_backbone,
    check_views,
    embed_views,
    has_batch_statistics,
    momentum_copy,
    spread,
)
from selfsup.methods.prototypes import move_center, prototype_schedules, views_loss
from selfsup.schedules import Plan, Schedule

Temperature = Annotated[float, Field(gt=0)]


class DINOOptions(Section):
    """Options of DINO; defaults are those of the published code."""

    out_dim: Positive = 65536
    """Prototypes, K."""
    hidden_dim: Positive = 2048
    bottleneck_dim: Positive = 256
    head_layers: Positive = 3
    head_batch_norm: bool = False
    norm_last_layer: bool = True
    """Keep the prototypes' scale at 1."""
    momentum: Probability = 0.996
    """Of the teacher; cosine to momentum_end."""
    momentum_end: Probability = 1.0
    student_temp: Temperature = 0.1
    teacher_temp: Temperature = 0.04
    warmup_teacher_temp: Temperature = 0.04
    teacher_temp_warmup: Duration = "0 epochs"
    """Linear from warmup_teacher_temp to teacher_temp."""
    center_momentum: Probability = 0.9
    freeze_last_layer: Duration = "1 epochs"
    """The prototypes keep their initial values for this long."""


class DINO(nn.Module):
    """Student, teacher and centre."""

    Options = DINOOptions
    labels: ClassVar[Labels] = "unused"

    center: Tensor
    batch_sum: Tensor
    batch_count: Tensor

    def __init__(self, config: Config, options: DINOOptions) -> None:
        super().__init__()
        self.options = options
        self._views = multicrop(config.views)
        self.global_views = config.views.global_.count
        check_views(config, "DINO")

        backbone = build_backbone(config)
        head = DINOHead(
            backbone.embed_dim,
            options.out_dim,
            hidden_dim=options.hidden_dim,
            bottleneck_dim=options.bottleneck_dim,
            layers=options.head_layers,
            batch_norm=options.head_batch_norm,
            norm_last_layer=options.norm_last_layer,
        )
        self.shortcuts = backbone.shortcuts
        self.student = Network(backbone, head)
        self.teacher = momentum_copy(self.student)
        self.random = key_stochastic_layers(self.student, config.seed)
        self.batch_statistics = has_batch_statistics(self.student)

        self.register_buffer("center", torch.zeros(options.out_dim))
        # the teacher's outputs of the step so far: the centre moves once a step, over the whole global batch
        self.register_buffer("batch_sum", torch.zeros(options.out_dim), persistent=False)
        self.register_buffer("batch_count", torch.zeros(()), persistent=False)

    def views(self) -> list[View]:
        """Global crops, then local ones."""
        return self._views

    def schedules(self, plan: Plan) -> dict[str, Schedule]:
        """Teacher momentum and temperature, and whether the prototypes are frozen (1 or 0)."""
        return prototype_schedules(self.options, plan)

    def forward(self, batch: ViewBatch, s: Mapping[str, float]) -> dict[str, Tensor]:
        """See `contract.Method.forward`. images: global [G, B, C, S, S] and, if there are any, local [L, B, C, s, s]."""
        size = batch.positions.shape[0]

        with torch.no_grad():
            images = batch.images[0]  # [G, B, C, S, S]
            (features,) = self.teacher.backbone.embed([images.flatten(0, 1)])  # [G*B, D]
            t = self.teacher.head(features).unflatten(0, (self.global_views, size))  # [G, B, K]
            t = at_least_float32(t)
            q = teacher_probabilities(t, self.center, s["teacher_temp"])  # [G, B, K]
            self.batch_sum += t.sum(dim=(0, 1))
            self.batch_count += t.shape[0] * t.shape[1]

        pooled = embed_views(self.student.backbone, batch, self.random)  # [views*B, D]
        frozen, fused = s["freeze_last_layer"] > 0, "prototypes" in self.shortcuts
        loss = views_loss(self.student.head, pooled, q, self.options.student_temp, frozen=frozen, fused=fused)

        with torch.no_grad():
            entropy, information = teacher_health(q)
        return {
            "loss": loss,
            "health/teacher_entropy": entropy,
            "health/information": information,
            "health/kl": loss.detach() - entropy * math.log(q.shape[-1]),
            "health/feature_std": spread(pooled[: self.global_views * size]),
        }

    @torch.no_grad()
    def after_step(self, s: Mapping[str, float], ok: Tensor) -> None:
        """EMA of the teacher; EMA of the centre from the mean over the global batch (equation 4)."""
        ema_update(self.teacher, self.student, s["momentum"], ok)
        dist.all_reduce_(self.batch_count)
        move_center(self.center, self.batch_sum, self.batch_count, self.options.center_momentum, ok)
        self.batch_count.zero_()

    def export(self) -> Backbone:
        """A copy of the teacher's backbone in eval mode."""
        return copy.deepcopy(self.teacher.backbone).eval()

    def backbones(self) -> dict[str, Backbone]:
        """Student and teacher."""
        return {"student": self.student.backbone, "teacher": self.teacher.backbone}

    def classifiers(self) -> dict[str, nn.Module]:
        """None: prototypes are no classes."""
        return {}
