"""VICReg (Bardes et al., 2022, "VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning").

One network embeds all views of an image. The embeddings of two views are pulled together (invariance), each dimension keeps
a standard deviation of 1 over the batch (variance), and the dimensions are decorrelated (covariance): no negatives, no
moving average, no predictor. Algorithm 1 of the paper. The statistics are those of the global batch, over all ranks.

With local views (`views.local`) every view is pulled towards each global one, and variance and covariance are of every view,
as in VICRegL's published code. With two global views and no local ones it is the paper's loss.
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
from selfsup.losses.vicreg import vicreg_terms
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
from selfsup.schedules import Plan, Schedule

Weight = Annotated[float, Field(ge=0)]


class VICRegOptions(Section):
    """Options of VICReg; defaults are those of the paper, section 4.2."""

    hidden_dim: Positive = 8192
    """Of the expander, which has three layers."""
    out_dim: Positive = 8192
    invariance: Weight = 25.0
    """lambda."""
    variance: Weight = 25.0
    """mu."""
    covariance: Weight = 1.0
    """nu."""


class VICReg(nn.Module):
    """One network."""

    Options = VICRegOptions
    labels: ClassVar[Labels] = "unused"
    whole_batch = "needs every image of a step at once: its variances and covariances are of the whole batch"
    batch_statistics = True

    def __init__(self, config: Config, options: VICRegOptions) -> None:
        super().__init__()
        self.options = options
        self._views = compared_views(config)
        self.global_views = config.views.global_.count

        backbone = build_backbone(config)
        # no bias at the end, as in the published code: no term would see it
        head = batch_norm_mlp(backbone.embed_dim, options.hidden_dim, options.hidden_dim, options.out_dim)
        self.student = Network(backbone, head)
        self.random = key_stochastic_layers(self.student, config.seed)

    def views(self) -> list[View]:
        """Global crops, then local ones."""
        return self._views

    def schedules(self, plan: Plan) -> dict[str, Schedule]:
        """None."""
        return {}

    def forward(self, batch: ViewBatch, s: Mapping[str, float]) -> dict[str, Tensor]:
        """See `contract.Method.forward`. images: global [G, B, C, S, S] and, if there are any, local [L, B, C, s, s].

        Every view goes through the network by itself: batch norm normalises over the images of one view.
        """
        views, o = len(self._views), self.options
        pooled = embed_views(self.student.backbone, batch, self.random, apart=True)  # [V*B, D]
        z = each_view(self.student.head, pooled, views)  # [V, B, K]
        invariance, variance, covariance = vicreg_terms(gather_images(z), self.global_views)
        return {
            "loss": o.invariance * invariance + o.variance * variance + o.covariance * covariance,
            "invariance": invariance,
            "variance": variance,
            "covariance": covariance,
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
