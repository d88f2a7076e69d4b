"""SwAV (Caron et al., 2020, "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments").

Every view of an image is to tell to which prototypes another view of it was assigned (equation 2, the swapped prediction).
Assignments ("codes") are made for the global views, over all images of a step at once and in equal parts to all prototypes,
by Sinkhorn-Knopp (section 3.1), local views learn from them only (multi-crop, section 3.3). With small batches the embeddings
of former steps, of which a queue holds the last ones, take part in the assignment (section 4.1, appendix A).

The queue is the same on every process and part of the checkpoint; each process scores its share of it. The published code
begins to fill its queue at `queue_start`, and uses it when it is full. Here it is filled from the first step on, and used from
the same step as there, when it holds the same embeddings.
"""

import copy
import math
from collections.abc import Mapping
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from lightly.models.modules.heads import SwaVProjectionHead
from pydantic import Field
from torch import Tensor, nn

from selfsup import dist
from selfsup.backbones import Backbone
from selfsup.backbones.stochastic import key_stochastic_layers
from selfsup.config import Config, Duration, Positive, Section
from selfsup.data.views import View
from selfsup.losses.dino import dino_loss, teacher_health
from selfsup.losses.numerics import at_least_float32, full_precision
from selfsup.losses.sinkhorn import sinkhorn_knopp
from selfsup.methods.contract import Labels, ViewBatch
from selfsup.methods.network import (
    Network,
    build_backbone,
    compared_views,
    embed_views,
    has_batch_statistics,
    spread,
)
from selfsup.schedules import Plan, Schedule

Temperature = Annotated[float, Field(gt=0)]
compare = full_precision(F.linear)


class SwAVOptions(Section):
    """Options of SwAV; defaults are those of the published code."""

    prototypes: Positive = 3000
    """K."""
    hidden_dim: Positive = 2048
    """Of the projection head."""
    out_dim: Positive = 128
    temperature: Temperature = 0.1
    epsilon: Temperature = 0.05
    """Temperature of the assignments."""
    sinkhorn_iterations: Positive = 3
    freeze_prototypes: Duration = "1 epochs"
    """They keep their initial values for this long: 313 steps of 4,096 images."""
    queue_length: Annotated[int, Field(ge=0)] = 0
    """Embeddings of former steps, of each global view, that take part in the assignment; 3,840 with batches of 256."""
    queue_start: Duration = "15 epochs"
    """When a queue begins to be filled; it is used once it is full."""


class SwAVHead(nn.Module):
    """Projection to the unit sphere, and prototypes on it."""

    def __init__(self, in_dim: int, options: SwAVOptions) -> None:
        super().__init__()
        self.projection = SwaVProjectionHead(in_dim, options.hidden_dim, options.out_dim)
        self.prototypes = nn.Linear(options.out_dim, options.prototypes, bias=False)
        with torch.no_grad():
            self.prototypes.weight.copy_(F.normalize(self.prototypes.weight, dim=1))

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_dim] -> embeddings [N, out_dim] of length 1."""
        return F.normalize(at_least_float32(self.projection(x)), dim=-1)


class SwAV(nn.Module):
    """Backbone, projection head, prototypes and queue."""

    Options = SwAVOptions
    labels: ClassVar[Labels] = "unused"
    whole_batch = "needs every image of a step at once: it assigns them to its prototypes in equal parts"

    queue: Tensor
    embeddings: Tensor

    def __init__(self, config: Config, options: SwAVOptions) -> None:
        super().__init__()
        self.options = options
        self._views = compared_views(config)
        self.global_views = config.views.global_.count
        backbone = build_backbone(config)
        self.student = Network(backbone, SwAVHead(backbone.embed_dim, options))
        self.random = key_stochastic_layers(self.student, config.seed)
        self.batch_statistics = has_batch_statistics(self.student)
        shape = (self.global_views, options.queue_length, options.out_dim)
        self.register_buffer("queue", torch.zeros(shape) if options.queue_length else None)  # the newest first
        # the step's embeddings, at their images' places in the global batch
        shape = (self.global_views, config.global_batch, options.out_dim)
        fresh = torch.zeros(shape) if options.queue_length else None
        self.register_buffer("embeddings", fresh, persistent=False)

    def views(self) -> list[View]:
        """Global crops, then local ones."""
        return self._views

    def schedules(self, plan: Plan) -> dict[str, Schedule]:
        """Whether the prototypes are frozen, and whether the queue is used (1 or 0)."""
        o = self.options
        freeze = plan.steps_of(o.freeze_prototypes)
        full = plan.steps_of(o.queue_start) + math.ceil(o.queue_length / plan.global_batch)
        return {
            "freeze_prototypes": lambda step: float(step < freeze),
            "queue": lambda step: float(o.queue_length > 0 and step >= full),
        }

    def forward(self, batch: ViewBatch, s: Mapping[str, float]) -> dict[str, Tensor]:
        """See `contract.Method.forward`. images: global [G, B, C, S, S] and, if there are any, local [L, B, C, s, s]."""
        size, head = batch.positions.shape[0], self.student.head
        pooled = embed_views(self.student.backbone, batch, self.random)  # [V*B, D]
        z = head(pooled)  # [V*B, out]
        weight = head.prototypes.weight.detach() if s["freeze_prototypes"] > 0 else head.prototypes.weight
        scores = compare(z, weight).unflatten(0, (len(self._views), size))  # [V, B, K]
        codes = self.assign(scores[: self.global_views].detach(), s["queue"] > 0)  # [G, B, K]
        if self.options.queue_length:
            views = z.detach()[: self.global_views * size].unflatten(0, (-1, size))  # [G, B, out]
            self.embeddings.index_copy_(1, batch.positions, views.to(self.embeddings.dtype))
        loss = dino_loss(scores, codes, self.options.temperature)
        with torch.no_grad():
            entropy, information = teacher_health(codes)
        return {
            "loss": loss,
            "health/teacher_entropy": entropy,
            "health/information": information,
            "health/feature_std": spread(pooled[: self.global_views * size]),
        }

    @torch.no_grad()
    def assign(self, scores: Tensor, with_queue: bool) -> Tensor:
        """Codes [G, B, K] of each global view by itself, over the images of all processes and, if so, the queue's."""
        o, size = self.options, scores.shape[1]
        out = []
        for view, rows in enumerate(scores):
            if with_queue:
                former = self.queue[view].tensor_split(dist.world())[dist.rank()]  # [L / world, out]
                rows = torch.cat((rows, compare(former, self.student.head.prototypes.weight)))
            out.append(sinkhorn_knopp(rows, o.epsilon, o.sinkhorn_iterations, dist.all_reduce_)[:size])
        return torch.stack(out)

    @torch.no_grad()
    def after_step(self, s: Mapping[str, float], ok: Tensor) -> None:
        """Prototypes back to length 1; the step's embeddings enter the queue."""
        weight = self.student.head.prototypes.weight
        weight.copy_(torch.where(ok > 0, F.normalize(weight, dim=1), weight))
        if self.options.queue_length:
            dist.all_reduce_(self.embeddings)  # zero where another process has the image
            moved = torch.cat((self.embeddings, self.queue), 1)[:, : self.options.queue_length]
            self.queue.copy_(torch.where(ok > 0, moved, self.queue))
            self.embeddings.zero_()

    def export(self) -> Backbone:
        """A copy of the backbone in eval mode."""
        return copy.deepcopy(self.student.backbone).eval()

    def backbones(self) -> dict[str, Backbone]:
        """The one there is."""
        return {"student": self.student.backbone}

    def classifiers(self) -> dict[str, nn.Module]:
        """None: prototypes are no classes."""
        return {}
