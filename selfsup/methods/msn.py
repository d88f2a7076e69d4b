"""MSN: Masked Siamese Networks (Assran et al., 2022, "Masked Siamese Networks for Label-Efficient Learning").

The student sees anchor views, of which patches are left out (random masks) or all but a small crop is (focal views); the
teacher, its moving average, sees another view whole. Both are compared with learned prototypes, and each anchor is to be
assigned as the target view is, sharpened. That the mean prediction keeps a high entropy is what prevents collapse.
"""

import copy
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from selfsup import dist
from selfsup.backbones import Backbone
from selfsup.backbones.masked import check_maskable, embed_visible
from selfsup.backbones.stochastic import key_stochastic_layers
from selfsup.config import Config, Positive, Probability, Section
from selfsup.data.masks import random_masks, to_device
from selfsup.data.views import View, multicrop
from selfsup.data.visible_block import indices, visible_block
from selfsup.ema import ema_update
from selfsup.errors import UserError
from selfsup.heads import mlp
from selfsup.losses.dino import teacher_health
from selfsup.losses.msn import log_predictions, msn_loss, msn_targets
from selfsup.methods.contract import Labels, ViewBatch
from selfsup.methods.network import Network, build_backbone, drawing, has_batch_statistics, momentum_copy, spread
from selfsup.schedules import Plan, Schedule, linear

Temperature = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]


class MSNOptions(Section):
    """Options of MSN; defaults are those of the published code for a ViT-S, but for Sinkhorn-Knopp, which is optional."""

    prototypes: Positive = 1024
    hidden_dim: Positive = 2048
    output_dim: Positive = 256
    head_layers: Positive = 3
    head_batch_norm: bool = True
    mask_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.15
    """Patches left out of the anchors that are global views; larger models want more (0.7 for the paper's ViT-L)."""
    mask: Literal["random", "focal"] = "random"
    """Which patches those anchors keep: any, or one block. Local views are focal masks, in the size of what they keep."""
    temperature: Temperature = 0.1
    """tau."""
    sharpening: Annotated[float, Field(gt=0, le=1)] = 0.25
    """T, of the targets."""
    sinkhorn: Annotated[int, Field(ge=0)] = 0
    """Iterations of Sinkhorn-Knopp on the sharpened targets, over the global batch; 3 in the published configurations."""
    mean_entropy_weight: NonNegative = 1.0
    """lambda, of the entropy of the mean prediction."""
    entropy_weight: NonNegative = 0.0
    """Of the entropy of each prediction, which is made small."""
    momentum: Probability = 0.996
    """Of the teacher; linear to momentum_end."""
    momentum_end: Probability = 1.0


class MSN(nn.Module):
    """Student, teacher and prototypes, which both of them use."""

    Options = MSNOptions
    labels: ClassVar[Labels] = "unused"
    whole_batch = "needs every image of a step at once: it spreads their mean prediction over the prototypes"

    def __init__(self, config: Config, options: MSNOptions) -> None:
        super().__init__()
        self.options, self.seed = options, config.seed
        self._views = multicrop(config.views)
        self.masked_views, self.focal_views = config.views.global_.count - 1, config.views.local.count
        if self.masked_views < 0 or self.masked_views + self.focal_views < 1:
            raise UserError(
                f"views.global.count={config.views.global_.count}, views.local.count={self.focal_views}: method=msn compares "
                "a global view with others, which it masks; give at least one global view and two in all"
            )
        backbone = build_backbone(config)
        self.suits(backbone)
        self.grid = backbone.token_grid(config.views.global_.size)
        self.kept = max(1, int(self.grid[0] * self.grid[1] * (1 - options.mask_ratio)))
        dims = [backbone.embed_dim, *[options.hidden_dim] * (options.head_layers - 1), options.output_dim]
        self.student = Network(backbone, mlp(dims, batch_norm=options.head_batch_norm))
        self.teacher = momentum_copy(self.student)
        self.prototypes = nn.Parameter(torch.empty(options.prototypes, options.output_dim))
        nn.init.uniform_(self.prototypes, -(options.output_dim**-0.5), options.output_dim**-0.5)
        self.random = key_stochastic_layers(self.student, config.seed)
        self.batch_statistics = has_batch_statistics(self.student)

    @staticmethod
    def suits(backbone: Backbone) -> None:
        """Raise UserError for one whose patches cannot be hidden."""
        check_maskable(backbone, "method=msn")

    def views(self) -> list[View]:
        """The target, global anchors, local anchors."""
        return self._views

    def schedules(self, plan: Plan) -> dict[str, Schedule]:
        """The teacher's momentum."""
        return {"momentum": linear(self.options.momentum, self.options.momentum_end, plan.steps)}

    def visible(self, batch: ViewBatch) -> Tensor:
        """Indices of the patches that the global anchors keep: int64 [masked views * B, kept]."""
        places, total = batch.on_host(), self.grid[0] * self.grid[1]
        rows = []
        for view in range(1, 1 + self.masked_views):
            if self.options.mask == "focal":
                seen = visible_block(self.seed, batch.step, places, view, grid=self.grid, count=self.kept, roll=False)
            else:
                hidden = total - self.kept
                seen = ~random_masks(self.seed, batch.step, places, view, tokens=total, count=hidden)
            rows.append(to_device(indices(seen), batch.positions.device))  # [B, kept]
        return torch.cat(rows)

    def anchors(self, batch: ViewBatch) -> Tensor:
        """Pooled features of the anchors, [anchors * B, D]: masked views first."""
        backbone, size = self.student.backbone, batch.positions.shape[0]
        out = []
        if self.masked_views:
            images = batch.images[0][1:].flatten(0, 1)  # [M, B, C, S, S] -> [M*B, C, S, S]
            with drawing(self.random, batch.step, batch.keys(0)[size:]):
                out.append(embed_visible(backbone, images, self.visible(batch)))
        if self.focal_views:
            images, keys = batch.images[1].flatten(0, 1), batch.keys(1, 1 + self.masked_views)  # [F*B, C, s, s]
            out += backbone.embed([images], [keys], lambda keys: drawing(self.random, batch.step, keys))
        return torch.cat(out)

    def forward(self, batch: ViewBatch, s: Mapping[str, float]) -> dict[str, Tensor]:
        """See `contract.Method.forward`. images: global [1 + M, B, C, S, S] and, if there are any, local [F, B, C, s, s]."""
        o, size = self.options, batch.positions.shape[0]
        with torch.no_grad():
            (pooled,) = self.teacher.backbone.embed([batch.images[0][0]])  # [B, D]
            log_q = log_predictions(self.teacher.head(pooled), self.prototypes, o.temperature)  # [B, K]
            targets = msn_targets(log_q, o.sharpening, o.sinkhorn, dist.all_reduce_)

        z = self.student.head(self.anchors(batch)).unflatten(0, (-1, size))  # [V, B, output_dim]
        log_p = log_predictions(z, self.prototypes, o.temperature)  # [V, B, K]
        parts = msn_loss(log_p, targets, lambda mean: dist.all_gather_with_grad(mean[None]).mean(0))
        loss = parts.cross_entropy + o.mean_entropy_weight * parts.mean_entropy + o.entropy_weight * parts.entropy

        with torch.no_grad():
            entropy, information = teacher_health(targets[None])
        return {
            "loss": loss,
            "cross_entropy": parts.cross_entropy.detach(),
            "mean_entropy_loss": parts.mean_entropy.detach(),
            "health/teacher_entropy": entropy,
            "health/information": information,
            "health/feature_std": spread(pooled),
        }

    @torch.no_grad()
    def after_step(self, s: Mapping[str, float], ok: Tensor) -> None:
        """EMA of the teacher."""
        ema_update(self.teacher, self.student, s["momentum"], ok)

    def export(self) -> Backbone:
        """A copy of the teacher's backbone in eval mode."""
        return copy.deepcopy(self.teacher.backbone).eval()

    def backbones(self) -> dict[str, Backbone]:
        """Student and teacher."""
        return {"student": self.student.backbone, "teacher": self.teacher.backbone}

    def classifiers(self) -> dict[str, nn.Module]:
        """None: prototypes are no classes."""
        return {}
