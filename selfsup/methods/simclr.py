"""SimCLR (Chen et al., 2020, "A Simple Framework for Contrastive Learning of Visual Representations").

One network projects the views of every image; those of one image are to be alike, and unlike the views of all other images
of the step (algorithm 1). The contrast is over the global batch, of all processes.

With more than two views (`views.local`), each is contrasted with all, and an image's other views are each its partner in turn,
as the loss of SupCon has it for a class.
"""

import copy
from collections.abc import Mapping
from typing import Annotated, ClassVar

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


class SimCLROptions(Section):
    """Options of SimCLR; defaults are those of the paper, sections 2.1, 4.2 and 5.1, and its published code."""

    hidden_dim: Positive = 2048
    """Of the projection head: as wide as a ResNet-50's features."""
    out_dim: Positive = 128
    head_layers: Annotated[int, Field(ge=2)] = 2
    """3 in SimCLR v2."""
    head_batch_norm: bool = True
    """After each linear layer of the head, also the last, as in the published code."""
    temperature: Annotated[float, Field(gt=0)] = 0.1


class SimCLR(nn.Module):
    """Backbone and projection head."""

    Options = SimCLROptions
    labels: ClassVar[Labels] = "unused"
    whole_batch = "needs every image of a step at once: it contrasts each with all the others"

    def __init__(self, config: Config, options: SimCLROptions) -> None:
        super().__init__()
        self.options = options
        self._views = compared_views(config)
        self.global_views = config.views.global_.count
        backbone = build_backbone(config)
        head = SimCLRProjectionHead(
            backbone.embed_dim, options.hidden_dim, options.out_dim, options.head_layers, options.head_batch_norm
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
        z = F.normalize(at_least_float32(self.student.head(pooled)), dim=-1)
        z = z.unflatten(0, (len(self._views), size))  # [V, B, out]
        own = batch.positions  # each image is like itself alone
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
