"""DINOv2: learning robust visual features without supervision (Oquab et al., 2024).

DINO's loss between views, iBOT's loss of masked patches with a head of its own ("untying"), the teacher's outputs of the
whole batch balanced by Sinkhorn-Knopp, and KoLeo, which spreads the embeddings. Section 4 of the paper. Registers (Darcet et
al., 2024) are an option of the backbone, `backbone.reg_tokens`. The last phase at high resolution is a second run that
continues the first one: `init_from=RUN init_from.heads=load` with larger views, as in the recipe dinov2_vitl14_highres.
Gram anchoring (Siméoni et al., 2025, "DINOv3", section 4) keeps patches told apart in long runs: `method.gram_weight`.
"""

import copy
import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from selfsup import dist
from selfsup.backbones import Backbone
from selfsup.backbones.masked import check_maskable
from selfsup.backbones.stochastic import key_stochastic_layers
from selfsup.config import Config, Duration, Positive, Probability, Section
from selfsup.data.views import View, multicrop
from selfsup.ema import ema_update
from selfsup.errors import UserError
from selfsup.heads import DINOHead
from selfsup.losses.dino import teacher_health
from selfsup.losses.koleo import koleo_loss
from selfsup.losses.sinkhorn import sinkhorn_knopp
from selfsup.methods.contract import Labels, ViewBatch
from selfsup.methods.gram import GramTeacher
from selfsup.methods.gram import schedules as gram_schedules
from selfsup.methods.network import (
    Network,
    build_backbone,
    check_views,
    gather_images,
    has_batch_statistics,
    momentum_copy,
    spread,
)
from selfsup.methods.patches import Heads, draw_masks, student_features, student_losses, tokens_of
from selfsup.methods.prototypes import prototype_schedules
from selfsup.schedules import Plan, Schedule

Temperature = Annotated[float, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]


class DINOv2Options(Section):
    """Options of DINOv2; defaults are those of the published code's ViT-L/14 (configs/train/vitl14.yaml)."""

    out_dim: Positive = 131072
    """Prototypes of views, K."""
    patch_out_dim: Positive | None = 131072
    """Prototypes of patches; null: patches share the head of CLS (table 1 of the paper: untied is better at scale)."""
    hidden_dim: Positive = 2048
    bottleneck_dim: Positive = 384
    patch_bottleneck_dim: Positive = 256
    head_layers: Positive = 3
    momentum: Probability = 0.994
    """Of the teacher; cosine to momentum_end."""
    momentum_end: Probability = 1.0
    student_temp: Temperature = 0.1
    teacher_temp: Temperature = 0.07
    warmup_teacher_temp: Temperature = 0.04
    teacher_temp_warmup: Duration = "30 epochs"
    freeze_last_layer: Duration = "1 epochs"
    """The prototypes keep their initial values for this long."""
    sinkhorn_iterations: Positive = 3
    mask_probability: Probability = 0.5
    """Share of the global views that have masked patches."""
    mask_ratio: tuple[Probability, Probability] = (0.1, 0.5)
    cls_weight: Weight = 1.0
    patch_weight: Weight = 1.0
    koleo_weight: Weight = 0.1
    """Of each global view's KoLeo, over the global batch."""
    gram_weight: Weight = 0.0
    """Of Gram anchoring; 0: none. DINOv3 has 2."""
    gram_start: Duration = "1000000 steps"
    """Where it begins. DINOv3 begins after a million steps."""
    gram_every: Duration = "10000 steps"
    """How often the teacher that it holds on to becomes the present one."""


class DINOv2(nn.Module):
    """Student and teacher."""

    Options = DINOv2Options
    labels: ClassVar[Labels] = "unused"
    whole_batch: ClassVar[str] = (
        "needs every image of a step at once: it balances prototypes, and keeps images apart, over the global batch"
    )

    def __init__(self, config: Config, options: DINOv2Options) -> None:
        super().__init__()
        self.options, self.seed = options, config.seed
        if options.mask_ratio[0] > options.mask_ratio[1]:
            raise UserError(f"method.mask_ratio={list(options.mask_ratio)}: give the lower share first")
        if config.global_batch < 2 and options.koleo_weight:
            raise UserError(f"global_batch={config.global_batch}: KoLeo keeps images apart; give 2 or more of them")
        self._views = multicrop(config.views)
        check_views(config, "DINOv2")
        backbone = build_backbone(config)
        self.suits(backbone)
        o = options

        def head(out_dim: int, bottleneck_dim: int) -> DINOHead:
            sizes: dict[str, Any] = {
                "hidden_dim": o.hidden_dim,
                "bottleneck_dim": bottleneck_dim,
                "layers": o.head_layers,
            }
            return DINOHead(backbone.embed_dim, out_dim, **sizes)

        own = None if o.patch_out_dim is None else head(o.patch_out_dim, o.patch_bottleneck_dim)
        self.shortcuts = backbone.shortcuts
        self.student = Network(backbone, Heads(head(o.out_dim, o.bottleneck_dim), own, backbone.embed_dim))
        self.teacher = momentum_copy(self.student)
        self.gram = GramTeacher(self.teacher.backbone) if o.gram_weight else None
        self.random = key_stochastic_layers(self.student, config.seed)
        self.batch_statistics = has_batch_statistics(self.student)

    @staticmethod
    def suits(backbone: Backbone) -> None:
        """Raise UserError for one whose patches cannot be hidden."""
        check_maskable(backbone, "DINOv2")

    def views(self) -> list[View]:
        """Global crops, then local ones."""
        return self._views

    def schedules(self, plan: Plan) -> dict[str, Schedule]:
        """Teacher momentum and temperature, whether the prototypes are frozen (1 or 0), and Gram anchoring's."""
        o = self.options
        gram = gram_schedules(o.gram_weight, o.gram_start, o.gram_every, plan) if self.gram else {}
        return prototype_schedules(o, plan) | gram

    def forward(self, batch: ViewBatch, s: Mapping[str, float]) -> dict[str, Tensor]:
        """See `contract.Method.forward`. images: global [G, B, C, S, S] and, if there are any, local [L, B, C, s, s]."""
        o, images = self.options, batch.images[0]
        grid = self.student.backbone.token_grid((images.shape[3], images.shape[4]))
        low, high = o.mask_ratio
        masks = draw_masks(batch, self.seed, grid, probability=o.mask_probability, low=low, high=high, spread=True)
        q_cls, q_patch = self._teach(images, masks.index, s["teacher_temp"])  # [G, B, K], [M, K']

        heads = self.student.head
        pooled, tokens = student_features(self.student.backbone, batch, masks, heads.mask_token, self.random)
        options = {"frozen": s["freeze_last_layer"] > 0, "fused": "prototypes" in self.shortcuts}
        cls, patch = student_losses(heads, pooled, tokens, (q_cls, q_patch), masks, o.student_temp, **options)
        loss = o.cls_weight * cls + o.patch_weight * patch
        out = {"cls_loss": cls, "patch_loss": patch}
        if o.koleo_weight:
            seen = pooled[: masks.masked.shape[0]].unflatten(0, images.shape[:2])  # [G, B, D]
            out["koleo_loss"] = torch.stack([koleo_loss(view) for view in gather_images(seen)]).sum()  # of [N, D] each
            loss = loss + o.koleo_weight * out["koleo_loss"]
        if self.gram is not None:  # 0 before it begins
            due = s["gram_weight"] > 0
            out["gram_loss"] = self.gram.loss(images.flatten(0, 1), tokens) if due else torch.zeros_like(loss)
            loss = loss + s["gram_weight"] * out["gram_loss"]
        with torch.no_grad():
            entropy, information = teacher_health(q_cls)
        return {
            "loss": loss,
            **out,
            "health/teacher_entropy": entropy,
            "health/information": information,
            "health/kl": cls.detach() - entropy * math.log(q_cls.shape[-1]),
            "health/feature_std": spread(pooled[: masks.masked.shape[0]]),
        }

    @torch.no_grad()
    def _teach(self, images: Tensor, index: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Assignments of the views [G, B, K], all together, and of the masked patches [M, K'], balanced over all ranks."""
        teacher, rounds = self.teacher, self.options.sinkhorn_iterations
        features = teacher.backbone(images.flatten(0, 1))  # of G*B images
        t = teacher.head.cls(features.pooled)  # [G*B, K]
        z = teacher.head.of_patches(tokens_of(teacher.backbone, features)[index])  # [M, K']
        q_cls = sinkhorn_knopp(t, temperature, rounds, dist.all_reduce_)
        return q_cls.unflatten(0, images.shape[:2]), sinkhorn_knopp(z, temperature, rounds, dist.all_reduce_)

    @torch.no_grad()
    def after_step(self, s: Mapping[str, float], ok: Tensor) -> None:
        """EMA of the teacher; the Gram teacher becomes it when that is due."""
        ema_update(self.teacher, self.student, s["momentum"], ok)
        if self.gram is not None:
            self.gram.after_step(self.teacher.backbone, s["gram_copies"], ok)

    def export(self) -> Backbone:
        """A copy of the teacher's backbone in eval mode."""
        return copy.deepcopy(self.teacher.backbone).eval()

    def backbones(self) -> dict[str, Backbone]:
        """Student and teacher."""
        return {"student": self.student.backbone, "teacher": self.teacher.backbone}

    def classifiers(self) -> dict[str, nn.Module]:
        """None: prototypes are no classes."""
        return {}
