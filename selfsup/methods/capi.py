"""CAPI: Cluster and Predict Latent Patches (Darcet et al., 2025, "Cluster and Predict Latents Patches for Improved Masked
Image Modeling").

The teacher, a moving average of the student's encoder, sees the image whole; its patch features are clustered as training
goes on, each position's patches evenly over all clusters. The student's encoder sees a block of patches, and a predictor
tells from that the clusters of patches that are hidden.
"""

import copy
from collections.abc import Mapping
from typing import Annotated, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from selfsup import dist
from selfsup.backbones import Backbone
from selfsup.backbones.masked import check_maskable, final_norm
from selfsup.backbones.stochastic import key_stochastic_layers
from selfsup.config import Config, Duration, Positive, Probability, Section
from selfsup.data.masks import draws, to_device
from selfsup.data.views import View, multicrop
from selfsup.data.visible_block import indices, visible_block
from selfsup.ema import ema_update
from selfsup.errors import UserError
from selfsup.heads import Prototypes
from selfsup.losses.capi import assignments, cluster_cross_entropy
from selfsup.losses.dino import teacher_health
from selfsup.losses.numerics import at_least_float32
from selfsup.methods.contract import Labels, ViewBatch
from selfsup.methods.network import Network, build_backbone, drawing, has_batch_statistics, momentum_copy, spread
from selfsup.predictors import CrossPredictor
from selfsup.schedules import Plan, Schedule, cosine, linear

Temperature = Annotated[float, Field(gt=0)]
_PREDICTED = 6  # what the draws are for, see `data.masks`


class CAPIOptions(Section):
    """Options of CAPI; defaults are those of the published code (ViT-L/14)."""

    clusters: Positive = 16384
    mask_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.65
    """Hidden patches; those that are left form one block."""
    roll: bool = True
    """The visible block may go over the edges, so that all patches are hidden equally often."""
    predicted: Annotated[float, Field(gt=0, le=1)] = 0.05
    """Of the hidden patches, at random; at least one an image."""
    predictor_dim: Positive | None = None
    """Default: the encoder's."""
    predictor_depth: Positive = 12
    predictor_heads: Positive | None = None
    """Default: as many as the encoder has."""
    predictor_drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.2
    student_temp: Temperature = 0.12
    target_temp: Temperature = 0.06
    """Of the assignments."""
    cluster_temp: Temperature = 0.12
    """Of the clusters' own predictions, which learn the assignments."""
    sinkhorn: Positive = 3
    """Iterations of Sinkhorn-Knopp."""
    positionwise: bool = True
    """Balance clusters at each position by itself."""
    momentum: Probability = 0.999
    """Of the teacher; cosine to momentum_end."""
    momentum_end: Probability = 1.0
    momentum_warmup: Duration = "10%"
    """Before, in a line from 1, as the learning rate warms up."""


class Student(nn.Module):
    """Predictor and its prototypes, on the unit sphere."""

    def __init__(self, predictor: CrossPredictor, dim: int, clusters: int) -> None:
        super().__init__()
        self.predictor = predictor
        self.prototypes = Prototypes(dim, clusters, normalised=True)

    def forward(self, seen: Tensor, where: Tensor, wanted: Tensor) -> Tensor:
        """As `CrossPredictor`, -> scores [B, T, K]."""
        x = at_least_float32(self.predictor(seen, where, wanted))
        return self.prototypes(F.normalize(x, dim=-1))


class Clusters(nn.Module):
    """Scores of normalised features: a linear layer, which learns by gradient."""

    def __init__(self, dim: int, clusters: int) -> None:
        super().__init__()
        self.layer = nn.Linear(dim, clusters)
        nn.init.normal_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., K]."""
        return self.layer(F.normalize(at_least_float32(x), dim=-1))


class CAPI(nn.Module):
    """`student`: encoder, and predictor with prototypes (its head); `teacher`: encoder, and the clusters, which are trained."""

    Options = CAPIOptions
    labels: ClassVar[Labels] = "unused"
    whole_batch = "needs every image of a step at once: its clusters share out the global batch"

    def __init__(self, config: Config, options: CAPIOptions) -> None:
        super().__init__()
        self.options, self.seed = options, config.seed
        self._views = [view for view in multicrop(config.views) if view.kind == "global"]  # local ones are not made
        if not self._views:
            raise UserError("views.global.count=0: method=capi predicts parts of global views; give 1")
        backbone = build_backbone(config)
        self.suits(backbone)
        self.grid = backbone.token_grid(config.views.global_.size)
        self.patches = self.grid[0] * self.grid[1]
        self.hidden = min(max(1, int(self.patches * options.mask_ratio)), self.patches - 1)
        if self.hidden < 1:
            raise UserError(
                f"views.global.size={config.views.global_.size}: one patch; method=capi hides some and shows some"
            )
        dim = options.predictor_dim or backbone.embed_dim
        heads = options.predictor_heads or int(backbone.model.blocks[0].attn.num_heads)  # type: ignore[union-attr, index]
        if dim % heads or dim % 4:
            raise UserError(
                f"method.predictor_dim={dim}: not a multiple of 4 and of method.predictor_heads={heads} (both are the encoder's, "
                "unless given); change one of them"
            )
        depth, drop = options.predictor_depth, options.predictor_drop_path
        predictor = CrossPredictor(backbone.embed_dim, self.grid, dim=dim, depth=depth, heads=heads, drop_path=drop)
        self.student = Network(backbone, Student(predictor, dim, options.clusters))
        self.teacher = Network(momentum_copy(backbone), Clusters(backbone.embed_dim, options.clusters))
        self.random = key_stochastic_layers(self.student, config.seed)
        self.batch_statistics = has_batch_statistics(self.student)

    @staticmethod
    def suits(backbone: Backbone) -> None:
        """Raise UserError for one whose patches cannot be hidden."""
        check_maskable(backbone, "method=capi")

    def views(self) -> list[View]:
        """Global crops alone."""
        return self._views

    def schedules(self, plan: Plan) -> dict[str, Schedule]:
        """The teacher's momentum."""
        o = self.options
        warmup = plan.steps_of(o.momentum_warmup)
        rise, then = linear(1.0, o.momentum, warmup), cosine(o.momentum, o.momentum_end, max(1, plan.steps - warmup))
        return {"momentum": lambda step: rise(step) if step < warmup else then(step - warmup)}

    def patches_of(self, batch: ViewBatch) -> tuple[Tensor, Tensor]:
        """Indices of the visible patches [V*B, C], and of those to predict [V*B, T]; views first."""
        shown, wanted = [], []
        count = max(1, int(self.hidden * self.options.predicted))
        for view in range(len(self._views)):
            key = (self.seed, batch.step, batch.on_host(), view)
            seen = visible_block(*key, grid=self.grid, count=self.patches - self.hidden, roll=self.options.roll)
            order = np.argsort(draws(*key, self.patches, _PREDICTED) + seen, axis=1, kind="stable")  # hidden ones first
            shown.append(indices(seen))
            wanted.append(order[:, :count])
        device = batch.positions.device
        return to_device(np.concatenate(shown), device), to_device(np.concatenate(wanted), device)

    def forward(self, batch: ViewBatch, s: Mapping[str, float]) -> dict[str, Tensor]:
        """See `contract.Method.forward`. images: global [V, B, C, S, S]."""
        o, images = self.options, batch.images[0].flatten(0, 1)  # [V*B, C, S, S]
        where, wanted = self.patches_of(batch)

        with torch.no_grad():
            features = self.teacher.backbone(images)
            tokens = final_norm(self.teacher.backbone, features.patches.flatten(2).transpose(1, 2))  # [V*B, P, D]
        scores = self.teacher.head(tokens)  # [V*B, P, K]
        targets = assignments(scores, o.target_temp, o.sinkhorn, o.positionwise, dist.all_reduce_)
        clustering = cluster_cross_entropy(scores, targets, o.cluster_temp)
        targets = targets.gather(1, wanted[..., None].expand(-1, -1, targets.shape[-1]))  # [V*B, T, K]

        with drawing(self.random, batch.step, batch.keys(0)):
            seen = self.student.backbone.encode_visible(images, where)  # [V*B, prefix + C, D]
            predicted = self.student.head(seen, where, wanted)  # [V*B, T, K]
        prediction = cluster_cross_entropy(predicted, targets, o.student_temp)

        with torch.no_grad():
            entropy, information = teacher_health(targets.flatten(0, 1)[None])
        return {
            "loss": prediction + clustering,
            "prediction_loss": prediction.detach(),
            "clustering_loss": clustering.detach(),
            "health/teacher_entropy": entropy,
            "health/information": information,
            "health/feature_std": spread(features.pooled),
        }

    @torch.no_grad()
    def after_step(self, s: Mapping[str, float], ok: Tensor) -> None:
        """EMA of the teacher's encoder; its clusters moved by gradient."""
        ema_update(self.teacher.backbone, self.student.backbone, s["momentum"], ok)

    def export(self) -> Backbone:
        """A copy of the teacher's encoder in eval mode, as the paper evaluates it."""
        return copy.deepcopy(self.teacher.backbone).eval()

    def backbones(self) -> dict[str, Backbone]:
        """Student's and teacher's encoder."""
        return {"student": self.student.backbone, "teacher": self.teacher.backbone}

    def classifiers(self) -> dict[str, nn.Module]:
        """None: clusters are no classes."""
        return {}
