"""SimSiam (Chen & He, 2021, "Exploring Simple Siamese Representation Learning").

One network projects all views of an image; a predictor learns to say from one view's projection what another's is, and no
gradient goes through the latter: that alone keeps it from collapsing. Algorithm 1 of the paper: BYOL without the moving
average.

With local views (`views.local`) each of them predicts every global view's projection, and the loss is a mean over the pairs
(multi-crop as in SwAV: Caron et al., 2020, section 3.3). With two global views and no local ones it is the paper's loss.
"""

import copy
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

from selfsup.backbones import Backbone
from selfsup.backbones.stochastic import key_stochastic_layers
from selfsup.config import Config, Positive, Section
from selfsup.data.views import View
from selfsup.heads import batch_norm_mlp
from selfsup.losses.cosine import predicted_cosine
from selfsup.methods.contract import Labels, ViewBatch
from selfsup.methods.network import Network, build_backbone, compared_views, each_view, embed_views, spread
from selfsup.schedules import Plan, Schedule, constant, learning_rate, peak_learning_rate


class SimSiamOptions(Section):
    """Options of SimSiam; defaults are those of the paper, section 3."""

    hidden_dim: Positive = 2048
    """Of the projector, which has three layers."""
    out_dim: Positive = 2048
    predictor_dim: Positive = 512
    """Of the predictor's hidden layer: a bottleneck."""
    fix_predictor_lr: bool = True
    """The predictor learns at the peak rate throughout (table 1, "lr not decayed": it adapts to the latest projections)."""


class SimSiam(nn.Module):
    """One network and a predictor."""

    Options = SimSiamOptions
    labels: ClassVar[Labels] = "unused"
    whole_batch = "needs every image of a step at once: its projector and predictor normalise over the batch"
    batch_statistics = True

    def __init__(self, config: Config, options: SimSiamOptions) -> None:
        super().__init__()
        self.options = options
        self.config = config
        self._views = compared_views(config)
        self.global_views = config.views.global_.count

        backbone, o = build_backbone(config), options
        norm = nn.BatchNorm1d(o.out_dim, affine=False)  # without scale and shift, as in the published code
        head = batch_norm_mlp(backbone.embed_dim, o.hidden_dim, o.hidden_dim, o.out_dim, last=norm)
        self.student = Network(backbone, head)
        self.predictor = batch_norm_mlp(o.out_dim, o.predictor_dim, o.out_dim, bias=True)
        self.random = key_stochastic_layers(self.student, config.seed)

    def views(self) -> list[View]:
        """Global crops, then local ones."""
        return self._views

    def schedules(self, plan: Plan) -> dict[str, Schedule]:
        """The predictor's learning rate."""
        peak = peak_learning_rate(self.config)
        fixed = self.options.fix_predictor_lr
        return {"lr_predictor": constant(peak) if fixed else learning_rate(self.config.optimizer, peak, plan)}

    def rate_of(self, name: str, parameter: nn.Parameter) -> str:
        """Which schedule a parameter's learning rate is."""
        return "lr_predictor" if name.startswith("predictor.") else "lr"

    def forward(self, batch: ViewBatch, s: Mapping[str, float]) -> dict[str, Tensor]:
        """See `contract.Method.forward`. images: global [G, B, C, S, S] and, if there are any, local [L, B, C, s, s].

        Every view goes through the networks by itself: batch norm normalises over the images of one view.
        """
        views = len(self._views)
        pooled = embed_views(self.student.backbone, batch, self.random, apart=True)  # [V*B, D]
        z = each_view(self.student.head, pooled, views)  # [V, B, K]
        p = each_view(self.predictor, z.flatten(0, 1), views)  # [V, B, K]
        return {
            "loss": -predicted_cosine(p, z[: self.global_views].detach()),  # equations 1 to 4
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
