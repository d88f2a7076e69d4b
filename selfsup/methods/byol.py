"""BYOL (Grill et al., 2020, "Bootstrap Your Own Latent: A New Approach to Self-Supervised Learning").

The student (the paper's online network) and its moving average, the teacher (the target network), each project a view of
an image; a predictor on the student's side learns to say from the projection of one view what the teacher's projection of
another is. There are no negatives: predictor and moving average keep it from collapsing. Section 3.1 and figure 2.

With local views (`views.local`) each of them predicts the teacher's projection of every global view, and the loss is a mean
over the pairs: multi-crop as in SwAV (Caron et al., 2020, section 3.3), whose targets are of full-size crops alone. With two
global views and no local ones it is the paper's loss.
"""

import copy
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from selfsup.backbones import Backbone
from selfsup.backbones.stochastic import key_stochastic_layers
from selfsup.config import Config, Positive, Probability, Section
from selfsup.data.views import View
from selfsup.ema import ema_update
from selfsup.heads import batch_norm_mlp
from selfsup.losses.cosine import predicted_cosine
from selfsup.methods.contract import Labels, ViewBatch
from selfsup.methods.network import (
    Network,
    build_backbone,
    compared_views,
    each_view,
    embed_views,
    momentum_copy,
    spread,
)
from selfsup.schedules import Plan, Schedule, cosine


class BYOLOptions(Section):
    """Options of BYOL; defaults are those of the paper, section 3.3."""

    hidden_dim: Positive = 4096
    """Of projector and predictor."""
    out_dim: Positive = 256
    momentum: Probability = 0.996
    """Of the teacher; cosine to momentum_end."""
    momentum_end: Probability = 1.0


class BYOL(nn.Module):
    """Student, predictor and teacher."""

    Options = BYOLOptions
    labels: ClassVar[Labels] = "unused"
    whole_batch = "needs every image of a step at once: its projector and predictor normalise over the batch"
    batch_statistics = True

    def __init__(self, config: Config, options: BYOLOptions) -> None:
        super().__init__()
        self.options = options
        self._views = compared_views(config)
        self.global_views = config.views.global_.count

        backbone = build_backbone(config)
        # without bias at the end, as in the published code: the predictor's batch norm would take it away
        head = batch_norm_mlp(backbone.embed_dim, options.hidden_dim, options.out_dim)
        self.student = Network(backbone, head)
        self.teacher = momentum_copy(self.student)
        self.predictor = batch_norm_mlp(options.out_dim, options.hidden_dim, options.out_dim)
        self.random = key_stochastic_layers(self.student, config.seed)

    def views(self) -> list[View]:
        """Global crops, then local ones."""
        return self._views

    def schedules(self, plan: Plan) -> dict[str, Schedule]:
        """Teacher momentum: 1 - (1 - tau) (cos(pi k / K) + 1) / 2 (section 3.3)."""
        return {"momentum": cosine(self.options.momentum, self.options.momentum_end, plan.steps)}

    def forward(self, batch: ViewBatch, s: Mapping[str, float]) -> dict[str, Tensor]:
        """See `contract.Method.forward`. images: global [G, B, C, S, S] and, if there are any, local [L, B, C, s, s].

        Every view goes through the networks by itself: batch norm, also the teacher's, normalises over the images of one view.
        """
        with torch.no_grad():
            features = embed_views(self.teacher.backbone, batch, None, kinds=1, apart=True)  # [G*B, D]
            z = each_view(self.teacher.head, features, self.global_views)  # [G, B, K]

        pooled = embed_views(self.student.backbone, batch, self.random, apart=True)  # [V*B, D]
        projections = each_view(self.student.head, pooled, len(self._views))  # [V, B, K]
        p = each_view(self.predictor, projections.flatten(0, 1), len(self._views))  # [V, B, K]

        # equations 2 and 3: |unit(p) - unit(z)|^2 = 2 - 2 cos, the sum of both directions
        return {
            "loss": 4 * (1 - predicted_cosine(p, z)),
            "health/feature_std": spread(pooled[: z.shape[0] * z.shape[1]]),
        }

    @torch.no_grad()
    def after_step(self, s: Mapping[str, float], ok: Tensor) -> None:
        """EMA of the teacher; its batch norm keeps the student's running statistics (no loss uses them)."""
        ema_update(self.teacher, self.student, s["momentum"], ok)

    def export(self) -> Backbone:
        """A copy of the student's backbone in eval mode: what the paper keeps (section 3.1)."""
        return copy.deepcopy(self.student.backbone).eval()

    def backbones(self) -> dict[str, Backbone]:
        """Student and teacher."""
        return {"student": self.student.backbone, "teacher": self.teacher.backbone}

    def classifiers(self) -> dict[str, nn.Module]:
        """None: it knows no classes."""
        return {}
