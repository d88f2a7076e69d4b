"""MoCo v2 (He et al., 2020, "Momentum Contrast for Unsupervised Visual Representation Learning"; Chen et al., 2020, "Improved
Baselines with Momentum Contrastive Learning").

The student encodes a view of an image as a query, the teacher, its moving average, another view as its key. A query is to be
like its key and unlike the keys of former steps, of which a queue holds the last K (algorithm 1 of the former, with the
head and the temperature of the latter).

The key is the last global view; every other view, local ones too, is a query. The queue is the same on every process and
part of the checkpoint; keys of a step enter it in the order of the global batch, after the step.

There is no shuffling of images among processes (section 3.3, "Shuffling BN"). It hides that a query and its key were normalised
with the same few images of one device, which tells them from the queue's. Batch norm here is of all images of a step, on
however many processes, so that there is no such group to tell; between steps of few images the statistics differ still.
"""

import copy
import dataclasses
from collections.abc import Mapping
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from lightly.models.modules.heads import MoCoProjectionHead
from pydantic import Field
from torch import Tensor, nn

from selfsup import dist
from selfsup.backbones import Backbone
from selfsup.backbones.stochastic import key_stochastic_layers
from selfsup.config import Config, Positive, Probability, Section
from selfsup.data.views import View, multicrop
from selfsup.ema import ema_update
from selfsup.errors import UserError
from selfsup.losses.info_nce import queue_info_nce
from selfsup.losses.numerics import at_least_float32
from selfsup.methods.contract import Labels, ViewBatch
from selfsup.methods.network import (
    Network,
    build_backbone,
    embed_views,
    has_batch_statistics,
    momentum_copy,
    spread,
)
from selfsup.schedules import Plan, Schedule, constant


class MoCoOptions(Section):
    """Options of MoCo; defaults are those of MoCo v2 and its published code."""

    hidden_dim: Positive = 2048
    """Of the projection head."""
    out_dim: Positive = 128
    queue_length: Positive = 65536
    """Keys of former steps, K."""
    momentum: Probability = 0.999
    """Of the teacher."""
    temperature: Annotated[float, Field(gt=0)] = 0.2


class MoCo(nn.Module):
    """Student, teacher and queue."""

    Options = MoCoOptions
    labels: ClassVar[Labels] = "unused"

    queue: Tensor
    queue_place: Tensor
    keys: Tensor

    def __init__(self, config: Config, options: MoCoOptions) -> None:
        super().__init__()
        self.options = options
        self._views = multicrop(config.views)
        if config.views.global_.count < 2:
            raise UserError(
                f"views.global.count={config.views.global_.count}: method={config.method.name} has one global view for the key "
                "and one for the query; give two or more"
            )
        if options.queue_length < config.global_batch:
            raise UserError(
                f"method.queue_length={options.queue_length}: the queue does not hold the keys of one step "
                f"(global_batch={config.global_batch}); give as many or more"
            )
        backbone = build_backbone(config)
        self.student = Network(
            backbone, MoCoProjectionHead(backbone.embed_dim, options.hidden_dim, options.out_dim, batch_norm=False)
        )
        self.teacher = momentum_copy(self.student)
        self.random = key_stochastic_layers(self.student, config.seed)
        self.batch_statistics = has_batch_statistics(self.student)
        self.register_buffer("queue", F.normalize(torch.randn(options.queue_length, options.out_dim), dim=1))
        self.register_buffer("queue_place", torch.zeros((), dtype=torch.int64))  # of the oldest key
        # the keys of the step so far, at their images' places in the global batch
        self.register_buffer("keys", torch.zeros(config.global_batch, options.out_dim), persistent=False)

    def views(self) -> list[View]:
        """Global crops, then local ones."""
        return self._views

    def schedules(self, plan: Plan) -> dict[str, Schedule]:
        """Teacher momentum."""
        return {"momentum": constant(self.options.momentum)}

    def forward(self, batch: ViewBatch, s: Mapping[str, float]) -> dict[str, Tensor]:
        """See `contract.Method.forward`. images: global [G, B, C, S, S] and, if there are any, local [L, B, C, s, s]."""
        size = batch.positions.shape[0]
        with torch.no_grad():
            (features,) = self.teacher.backbone.embed([batch.images[0][-1]])  # [B, D]
            keys = F.normalize(at_least_float32(self.teacher.head(features)), dim=-1)  # [B, out]
            self.keys.index_copy_(0, batch.positions, keys.to(self.keys.dtype))

        others = dataclasses.replace(batch, images=[batch.images[0][:-1], *batch.images[1:]])
        pooled = embed_views(self.student.backbone, others, self.random)  # [Q*B, D]
        queries = F.normalize(at_least_float32(self.student.head(pooled)), dim=-1).unflatten(0, (-1, size))
        loss = queue_info_nce(queries, keys, self.queue, self.options.temperature)  # queries: [Q, B, out]
        return {"loss": loss, "health/feature_std": spread(pooled[:size])}

    @torch.no_grad()
    def after_step(self, s: Mapping[str, float], ok: Tensor) -> None:
        """EMA of the teacher (equation 2); the step's keys take the place of the oldest."""
        ema_update(self.teacher, self.student, s["momentum"], ok)
        dist.all_reduce_(self.keys)  # zero where another process has the image
        count, length = len(self.keys), len(self.queue)
        rows = (self.queue_place + torch.arange(count, device=self.queue.device)) % length
        self.queue.index_copy_(0, rows, torch.where(ok > 0, self.keys, self.queue[rows]))
        self.queue_place.copy_(torch.where(ok > 0, (self.queue_place + count) % length, self.queue_place))
        self.keys.zero_()

    def export(self) -> Backbone:
        """A copy of the student's backbone in eval mode: the encoder of the queries, as in the paper."""
        return copy.deepcopy(self.student.backbone).eval()

    def backbones(self) -> dict[str, Backbone]:
        """Student and teacher."""
        return {"student": self.student.backbone, "teacher": self.teacher.backbone}

    def classifiers(self) -> dict[str, nn.Module]:
        """None: nothing here tells classes."""
        return {}
