"""MoCo v3 (Chen, Xie & He, 2021, "An Empirical Study of Training Self-Supervised Vision Transformers").

The student and a predictor encode every view as a query; the teacher, the student's moving average, the global views as keys.
A query is to be like the key of another view of its image, and unlike the keys of the other images of the step (algorithm 1).
There is no queue: the contrast is over the global batch, of all processes.

A ViT's patch projection keeps its random weights, without which its training is unstable (section 4.2).
"""

import copy
from collections.abc import Mapping
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from selfsup import dist
from selfsup.backbones import Backbone
from selfsup.backbones.stochastic import key_stochastic_layers
from selfsup.config import Config, Positive, Probability, Section
from selfsup.data.views import View
from selfsup.ema import ema_update
from selfsup.errors import UserError
from selfsup.heads import batch_norm_mlp
from selfsup.losses.info_nce import batch_info_nce
from selfsup.losses.numerics import at_least_float32
from selfsup.methods.contract import Labels, ViewBatch
from selfsup.methods.network import (
    Network,
    build_backbone,
    compared_views,
    each_view,
    embed_views,
    gather_images,
    momentum_copy,
    spread,
)
from selfsup.schedules import Plan, Schedule, cosine


class MoCoV3Options(Section):
    """Options of MoCo v3; defaults are those of the paper, section 4.1 and appendix A, for ViTs."""

    hidden_dim: Positive = 4096
    """Of projector and predictor."""
    out_dim: Positive = 256
    projector_layers: Annotated[int, Field(ge=2)] = 3
    """2 for a ResNet in the published code."""
    momentum: Probability = 0.99
    """Of the teacher; cosine to momentum_end."""
    momentum_end: Probability = 1.0
    temperature: Annotated[float, Field(gt=0)] = 0.2
    """1.0 for a ResNet in the published code."""
    freeze_patch_projection: bool | None = None
    """Of a ViT; null: if it is one."""


class MoCoV3(nn.Module):
    """Student, predictor and teacher."""

    Options = MoCoV3Options
    labels: ClassVar[Labels] = "unused"
    whole_batch = "needs every image of a step at once: it contrasts each with all the others"
    batch_statistics = True

    def __init__(self, config: Config, options: MoCoV3Options) -> None:
        super().__init__()
        self.options = options
        self._views = compared_views(config)
        self.global_views = config.views.global_.count
        backbone = build_backbone(config)
        width, out = options.hidden_dim, options.out_dim
        projector = [backbone.embed_dim, *[width] * (options.projector_layers - 1), out]
        head = batch_norm_mlp(*projector, last=nn.BatchNorm1d(out, affine=False))
        self.student = Network(backbone, head)
        _freeze_patch_projection(backbone, options.freeze_patch_projection)
        self.teacher = momentum_copy(self.student)
        self.predictor = batch_norm_mlp(out, width, out, last=nn.BatchNorm1d(out, affine=False))
        self.random = key_stochastic_layers(self.student, config.seed)

    def views(self) -> list[View]:
        """Global crops, then local ones."""
        return self._views

    def schedules(self, plan: Plan) -> dict[str, Schedule]:
        """Teacher momentum."""
        return {"momentum": cosine(self.options.momentum, self.options.momentum_end, plan.steps)}

    def forward(self, batch: ViewBatch, s: Mapping[str, float]) -> dict[str, Tensor]:
        """See `contract.Method.forward`. images: global [G, B, C, S, S] and, if there are any, local [L, B, C, s, s].

        Batch norm sees one view at a time, in backbones as in heads.
        """
        views, size = len(self._views), batch.positions.shape[0]
        with torch.no_grad():
            features = embed_views(self.teacher.backbone, batch, None, kinds=1, apart=True)  # [G*B, D]
            keys = each_view(self.teacher.head, features, self.global_views)  # [G, B, out]
            keys = gather_images(F.normalize(at_least_float32(keys), dim=-1))  # [G, N, out]
        pooled = embed_views(self.student.backbone, batch, self.random, apart=True)  # [V*B, D]
        projections = each_view(self.student.head, pooled, views)  # [V, B, out]
        queries = each_view(self.predictor, projections.flatten(0, 1), views)
        queries = F.normalize(at_least_float32(queries), dim=-1)  # [V, B, out]
        loss = batch_info_nce(queries, keys, dist.rank() * size, self.options.temperature)
        return {"loss": loss, "health/feature_std": spread(pooled[: self.global_views * size])}

    def after_step(self, s: Mapping[str, float], ok: Tensor) -> None:
        """EMA of the teacher."""
        ema_update(self.teacher, self.student, s["momentum"], ok)

    def export(self) -> Backbone:
        """A copy of the student's backbone in eval mode, as in the paper."""
        return copy.deepcopy(self.student.backbone).eval()

    def backbones(self) -> dict[str, Backbone]:
        """Student and teacher."""
        return {"student": self.student.backbone, "teacher": self.teacher.backbone}

    def classifiers(self) -> dict[str, nn.Module]:
        """None: nothing here tells classes."""
        return {}


def _freeze_patch_projection(backbone: Backbone, wanted: bool | None) -> None:
    """Leave the projection of patches as it is, of backbones that have one. Raises UserError if `wanted` and there is none."""
    projection = getattr(getattr(backbone.model, "patch_embed", None), "proj", None)
    if isinstance(projection, nn.Module) and wanted is not False:
        projection.requires_grad_(False)
    elif wanted:
        raise UserError(
            f"method.freeze_patch_projection=true: {backbone.name} has no projection of patches; leave it out, or use a ViT"
        )
