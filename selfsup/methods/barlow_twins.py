"""Barlow Twins (Zbontar et al., 2021, "Barlow Twins: Self-Supervised Learning via Redundancy Reduction").

One network embeds all views of an image. The cross-correlation matrix of two views' embeddings over the batch is brought
near the identity: each dimension says the same of both views, and no two dimensions say the same. Algorithm 1 of the paper;
the correlations are those of the global batch, over all ranks.

With local views (`views.local`) the loss is a mean over the pairs of a global view and any other one (multi-crop as in SwAV:
Caron et al., 2020, section 3.3; the paper has no local views). With two global views alone it is the paper's loss.
"""

import copy
from collections.abc import Mapping
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor, nn

from selfsup.backbones import Backbone
from selfsup.backbones.stochastic import key_stochastic_layers
from selfsup.config import Config, Positive, Section
from selfsup.data.views import View
from selfsup.heads import batch_norm_mlp
from selfsup.losses.barlow import barlow_terms
from selfsup.methods.contract import Labels, ViewBatch
from selfsup.methods.network import (
    Network,
    build_backbone,
    compared_views,
    each_view,
    embed_views,
    gather_images,
    spread,
)
from selfsup.schedules import Plan, Schedule, learning_rate, peak_learning_rate


class BarlowTwinsOptions(Section):
    """Options of Barlow Twins; defaults are those of the paper, sections 2.1 and 2.2."""

    hidden_dim: Positive = 8192
    """Of the projector, which has three layers."""
    out_dim: Positive = 8192
    redundancy: Annotated[float, Field(ge=0)] = 0.005
    """lambda, of the off-diagonal elements."""
    bias_lr: Annotated[float, Field(gt=0)] = 1.0
    """Learning rate of biases and norms over that of weights. LARS scales weights alone, and the paper gives the others
    0.0048 where weights have 0.2: 0.024."""


class BarlowTwins(nn.Module):
    """One network."""

    Options = BarlowTwinsOptions
    labels: ClassVar[Labels] = "unused"
    whole_batch = "needs every image of a step at once: its correlations are of the whole batch"
    batch_statistics = True

    def __init__(self, config: Config, options: BarlowTwinsOptions) -> None:
        super().__init__()
        self.options = options
        self.config = config
        self._views = compared_views(config)
        self.global_views = config.views.global_.count

        backbone = build_backbone(config)
        head = batch_norm_mlp(backbone.embed_dim, options.hidden_dim, options.hidden_dim, options.out_dim)
        self.student = Network(backbone, head)
        self.random = key_stochastic_layers(self.student, config.seed)

    def views(self) -> list[View]:
        """Global crops, then local ones."""
        return self._views

    def schedules(self, plan: Plan) -> dict[str, Schedule]:
        """The learning rate of biases and norms."""
        rate = learning_rate(self.config.optimizer, peak_learning_rate(self.config), plan)
        return {"lr_bias": lambda step: self.options.bias_lr * rate(step)}

    def rate_of(self, name: str, parameter: nn.Parameter) -> str:
        """Which schedule a parameter's learning rate is."""
        return "lr_bias" if parameter.ndim <= 1 else "lr"

    def forward(self, batch: ViewBatch, s: Mapping[str, float]) -> dict[str, Tensor]:
        """See `contract.Method.forward`. images: global [G, B, C, S, S] and, if there are any, local [L, B, C, s, s].

        Every view goes through the network by itself: batch norm normalises over the images of one view.
        """
        views = len(self._views)
        pooled = embed_views(self.student.backbone, batch, self.random, apart=True)  # [V*B, D]
        z = each_view(self.student.head, pooled, views)  # [V, B, K]
        invariance, redundancy = barlow_terms(gather_images(z), self.global_views)
        return {
            "loss": invariance + self.options.redundancy * redundancy,
            "invariance": invariance,
            "redundancy": redundancy,
            "health/feature_std": spread(pooled[: self.global_views * z.shape[1]]),
        }

    def after_step(self, s: Mapping[str, float], ok: Tensor) -> None:
        """Nothing moves but by the optimizer."""

    def export(self) -> Backbone:
        """A copy of the backbone in eval mode."""
        return copy.deepcopy(self.student.backbone).eval()

    def backbones(self) -> dict[str, Backbone]:
        """The student's."""
        return {"student": self.student.backbone}

    def classifiers(self) -> dict[str, nn.Module]:
        """None: it knows no classes."""
        return {}
