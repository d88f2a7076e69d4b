"""LeJEPA (Balestriero & LeCun, 2025, "LeJEPA: Provable and Scalable Self-Supervised Learning Without the Heuristics").

One network embeds all views of an image. Each view is brought near the mean of the global views, and the embeddings of the
global batch are made an isotropic Gaussian (SIGReg), so that they cannot collapse: no teacher, no predictor, no stop of
gradients. Algorithm 2 of the paper.

Local views (`views.local`) are the paper's own. For networks that are no ViTs it counts all views as global: give
`views.local.count=0` and as many global views as wanted.
"""

import copy
from collections.abc import Mapping
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from pydantic import AfterValidator, Field
from torch import Tensor, nn

from selfsup import dist
from selfsup.backbones import Backbone
from selfsup.backbones.stochastic import key_stochastic_layers
from selfsup.config import Config, Positive, Probability, Section
from selfsup.data.views import View
from selfsup.heads import batch_norm_mlp
from selfsup.losses.numerics import at_least_float32
from selfsup.losses.sigreg import sigreg, view_invariance
from selfsup.methods.contract import Labels, ViewBatch
from selfsup.methods.network import Network, build_backbone, compared_views, embed_views, spread
from selfsup.randomness import keyed_normal, mix
from selfsup.schedules import Plan, Schedule


def _odd(value: int) -> int:
    if value % 2 == 0:
        raise ValueError(f"{value} knots would leave out 0; give an odd number")
    return value


class LeJEPAOptions(Section):
    """Options of LeJEPA; defaults are what the paper recommends in section 6.1."""

    hidden_dim: Positive = 2048
    """Of the projector, which has three layers (the authors' minimal example)."""
    out_dim: Positive = 512
    """As in the authors' scripts for ViT-L on ImageNet; their minimal example has 16 for ten classes."""
    regularisation: Probability = 0.05
    """lambda: the loss is (1 - lambda) invariance + lambda SIGReg."""
    slices: Positive = 1024
    """Random directions, drawn anew each step."""
    points: Annotated[int, Field(ge=3), AfterValidator(_odd)] = 17
    """Knots of the quadrature on [-t_max, t_max]."""
    t_max: Annotated[float, Field(gt=0)] = 5.0
    """The authors' code has 3, and 33 points as counted here."""


class LeJEPA(nn.Module):
    """One network."""

    Options = LeJEPAOptions
    labels: ClassVar[Labels] = "unused"
    whole_batch = "needs every image of a step at once: it compares the distribution of the whole batch with a Gaussian"
    batch_statistics = True

    def __init__(self, config: Config, options: LeJEPAOptions) -> None:
        super().__init__()
        self.options = options
        self.seed = config.seed
        self._views = compared_views(config)
        self.global_views = config.views.global_.count

        backbone = build_backbone(config)
        head = batch_norm_mlp(backbone.embed_dim, options.hidden_dim, options.hidden_dim, options.out_dim, bias=True)
        self.student = Network(backbone, head)
        self.random = key_stochastic_layers(self.student, config.seed)

    def views(self) -> list[View]:
        """Global crops, then local ones."""
        return self._views

    def schedules(self, plan: Plan) -> dict[str, Schedule]:
        """None."""
        return {}

    def directions(self, step: int, like: Tensor) -> Tensor:
        """[K, slices], columns of length 1, uniform on the sphere: a function of (seed, step), the same on every rank."""
        shape = (self.options.out_dim, self.options.slices)
        places = torch.arange(shape[0] * shape[1], device=like.device).reshape(shape)
        return F.normalize(keyed_normal(mix(self.seed, step, 0x736C6963), places), dim=0).to(like.dtype)

    def forward(self, batch: ViewBatch, s: Mapping[str, float]) -> dict[str, Tensor]:
        """See `contract.Method.forward`. images: global [G, B, C, S, S] and, if there are any, local [L, B, C, s, s].

        Batch norm in the projector sees all views at once, as in the authors' code.
        """
        o = self.options
        pooled = embed_views(self.student.backbone, batch, self.random)  # [V*B, D]
        z = at_least_float32(self.student.head(pooled)).unflatten(0, (len(self._views), -1))  # [V, B, K]
        invariance = view_invariance(z, self.global_views)
        gaussian = sigreg(
            z,
            self.directions(batch.step, z),
            z.shape[1] * dist.world(),
            points=o.points,
            t_max=o.t_max,
            reduce=dist.mean_with_grad,
        )
        return {
            "loss": (1 - o.regularisation) * invariance + o.regularisation * gaussian,
            "invariance": invariance,
            "sigreg": gaussian,
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
