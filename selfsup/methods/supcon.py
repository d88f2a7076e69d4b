"""SupCon (Khosla et al., 2020, "Supervised Contrastive Learning").

One network projects the views of every image, as in SimCLR; here all views of all images of one class are to be alike, and
unlike those of other classes (equation 2, L_out). The contrast is over the global batch, of all processes. The labels are for
the backbone alone: nothing here tells classes, that is for a linear classifier on its features.

An image without a label is like itself alone, so that part of the images, or all of them, may have none.
"""

import copy
from collections.abc import Mapping
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from lightly.models.modules.heads import SimCLRProjectionHead
from pydantic import Field
from torch import Tensor, nn

from selfsup import dist
from selfsup.backbones import Backbone
from selfsup.backbones.stochastic import key_stochastic_layers
from selfsup.config import Config, Positive, Section
from selfsup.data.views import View
from selfsup.losses.info_nce import nt_xent
from selfsup.losses.numerics import at_least_float32
from selfsup.methods.contract import Labels, ViewBatch
from selfsup.methods.network import (
    Network,
    build_backbone,
    compared_views,
    embed_views,
    gather_images,
    has_batch_statistics,
    spread,
)
from selfsup.schedules import Plan, Schedule


class SupConOptions(Section):
    """Options of SupCon; defaults are those of the paper, sections 3.1 and 4, and its published code."""

    hidden_dim: Positive = 2048
    """Of the projection head."""
    out_dim: Positive = 128
    head_batch_norm: bool = False
    """After each linear layer of the head."""
    temperature: Annotated[float, Field(gt=0)] = 0.1


class SupCon(nn.Module):
    """Backbone and projection head."""

    Options = SupConOptions
    labels: ClassVar[Labels] = "optional"
    whole_batch = "needs every image of a step at once: it contrasts each with all the others"

    def __init__(self, config: Config, options: SupConOptions) -> None:
        super().__init__()
        self.options = options
        self._views = compared_views(config)
        self.global_views = config.views.global_.count
        backbone = build_backbone(config)
        head = SimCLRProjectionHead(
            backbone.embed_dim, options.hidden_dim, options.out_dim, batch_norm=options.head_batch_norm
        )
        self.student = Network(backbone, head)
        self.random = key_stochastic_layers(self.student, config.seed)
        self.batch_statistics = has_batch_statistics(self.student)

    def views(self) -> list[View]:
        """Global crops, then local ones."""
        return self._views

    def schedules(self, plan: Plan) -> dict[str, Schedule]:
        """None."""
        return {}

    def forward(self, batch: ViewBatch, s: Mapping[str, float]) -> dict[str, Tensor]:
        """See `contract.Method.forward`. images: global [G, B, C, S, S] and, if there are any, local [L, B, C, s, s]."""
        size = batch.positions.shape[0]
        pooled = embed_views(self.student.backbone, batch, self.random)  # [V*B, D]
        # of length 1 before the head, too (section 3.1)
        z = F.normalize(at_least_float32(self.student.head(F.normalize(pooled, dim=-1))), dim=-1)
        z = z.unflatten(0, (len(self._views), size))  # [V, B, out]
        own = torch.where(batch.labels >= 0, batch.labels, -1 - batch.positions)  # [B]
        loss = nt_xent(z, gather_images(z), own, dist.all_gather(own), dist.rank() * size, self.options.temperature)
        return {"loss": loss, "health/feature_std": spread(pooled[: self.global_views * size])}

    def after_step(self, s: Mapping[str, float], ok: Tensor) -> None:
        """Nothing moves but by the optimizer."""

    def export(self) -> Backbone:
        """A copy of the backbone in eval mode."""
        return copy.deepcopy(self.student.backbone).eval()

    def backbones(self) -> dict[str, Backbone]:
        """The one there is."""
        return {"student": self.student.backbone}

    def classifiers(self) -> dict[str, nn.Module]:
        """None: nothing here tells classes."""
        return {}
