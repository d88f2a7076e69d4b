"""iBOT: self-distillation of views and of masked patches (Zhou et al., 2022, "Image BERT Pre-Training with Online Tokenizer").

DINO, with masks: in half of the global views blocks of patches are hidden from the student. Beside DINO's loss between
views it learns to give each hidden patch the distribution that the teacher, which sees the whole view, gives to it. One head
serves both, or there are two. Section 3 of the paper.
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
from selfsup.losses.dino import teacher_health, teacher_probabilities
from selfsup.losses.numerics import at_least_float32
from selfsup.methods.contract import Labels, ViewBatch
from selfsup.methods.network import Network, build_backbone, check_views, has_batch_statistics, momentum_copy, spread
from selfsup.methods.patches import Heads, draw_masks, student_features, student_losses, tokens_of
from selfsup.methods.prototypes import move_center, prototype_schedules
from selfsup.schedules import Plan, Schedule, linear

Temperature = Annotated[float, Field(gt=0)]


class IBOTOptions(Section):
    """Options of iBOT; defaults are those of the paper (sections 3 and 4, appendix), or of the published code."""

    out_dim: Positive = 8192
    """Prototypes, K."""
    patch_out_dim: Positive | None = None
    """Of a head for patches alone, with a multi-layer perceptron of its own; null: patches share the head of CLS."""
    hidden_dim: Positive = 2048
    bottleneck_dim: Positive = 256
    head_layers: Positive = 3
    norm_last_layer: bool = True
    """Keep the prototypes' scale at 1."""
    momentum: Probability = 0.996
    """Of the teacher; cosine to momentum_end."""
    momentum_end: Probability = 1.0
    student_temp: Temperature = 0.1
    teacher_temp: Temperature = 0.07
    patch_temp: Temperature = 0.07
    """The teacher's, for patches."""
    warmup_teacher_temp: Temperature = 0.04
    """Of both, at first."""
    teacher_temp_warmup: Duration = "30 epochs"
    center_momentum: Probability = 0.9
    patch_center_momentum: Probability = 0.9
    freeze_last_layer: Duration = "1 epochs"
    """The prototypes keep their initial values for this long."""
    mask_probability: Probability = 0.5
    """Of a global view to have masked patches."""
    mask_ratio: tuple[Probability, Probability] = (0.1, 0.5)
    """Share of its patches, uniform between these (section 3.3: 0.3 +- 0.2)."""
    cls_weight: Annotated[float, Field(ge=0)] = 1.0
    patch_weight: Annotated[float, Field(ge=0)] = 1.0


class IBOT(nn.Module):
    """Student, teacher and two centres."""

    Options = IBOTOptions
    labels: ClassVar[Labels] = "unused"

    center: Tensor
    patch_center: Tensor
    batch_sum: Tensor
    patch_sum: Tensor
    batch_count: Tensor

    def __init__(self, config: Config, options: IBOTOptions) -> None:
        super().__init__()
        self.options, self.seed = options, config.seed
        if options.mask_ratio[0] > options.mask_ratio[1]:
            raise UserError(f"method.mask_ratio={list(options.mask_ratio)}: give the lower share first")
        self._views = multicrop(config.views)
        check_views(config, "iBOT")
        backbone = build_backbone(config)
        self.suits(backbone)
        o = options

        def head(out_dim: int) -> DINOHead:
            sizes: dict[str, Any] = {
                "hidden_dim": o.hidden_dim,
                "bottleneck_dim": o.bottleneck_dim,
                "layers": o.head_layers,
            }
            return DINOHead(backbone.embed_dim, out_dim, norm_last_layer=o.norm_last_layer, **sizes)

        own = None if o.patch_out_dim is None else head(o.patch_out_dim)
        self.shortcuts = backbone.shortcuts
        self.student = Network(backbone, Heads(head(o.out_dim), own, backbone.embed_dim))
        self.teacher = momentum_copy(self.student)
        self.random = key_stochastic_layers(self.student, config.seed)
        self.batch_statistics = has_batch_statistics(self.student)

        self.register_buffer("center", torch.zeros(o.out_dim))
        self.register_buffer("patch_center", torch.zeros(o.patch_out_dim or o.out_dim))
        # the teacher's outputs of the step so far: centres move once a step, over the whole global batch
        self.register_buffer("batch_sum", torch.zeros_like(self.center), persistent=False)
        self.register_buffer("patch_sum", torch.zeros_like(self.patch_center), persistent=False)
        self.register_buffer("batch_count", torch.zeros(()), persistent=False)

    @staticmethod
    def suits(backbone: Backbone) -> None:
        """Raise UserError for one whose patches cannot be hidden."""
        check_maskable(backbone, "iBOT")

    def views(self) -> list[View]:
        """Global crops, then local ones."""
        return self._views

    def schedules(self, plan: Plan) -> dict[str, Schedule]:
        """Teacher momentum, its temperatures, and whether the prototypes are frozen (1 or 0)."""
        o = self.options
        patch_temp = linear(o.warmup_teacher_temp, o.patch_temp, plan.steps_of(o.teacher_temp_warmup))
        return prototype_schedules(o, plan) | {"patch_temp": patch_temp}

    def forward(self, batch: ViewBatch, s: Mapping[str, float]) -> dict[str, Tensor]:
        """See `contract.Method.forward`. images: global [G, B, C, S, S] and, if there are any, local [L, B, C, s, s]."""
        o, images = self.options, batch.images[0]
        grid = self.student.backbone.token_grid((images.shape[3], images.shape[4]))
        low, high = o.mask_ratio
        masks = draw_masks(batch, self.seed, grid, probability=o.mask_probability, low=low, high=high, spread=False)
        q_cls, q_patch = self._teach(images, masks.index, s)  # [G, B, K], [M, K']

        heads = self.student.head
        pooled, tokens = student_features(self.student.backbone, batch, masks, heads.mask_token, self.random)
        options = {"frozen": s["freeze_last_layer"] > 0, "fused": "prototypes" in self.shortcuts}
        cls, patch = student_losses(heads, pooled, tokens, (q_cls, q_patch), masks, o.student_temp, **options)
        with torch.no_grad():
            entropy, information = teacher_health(q_cls)
        return {
            "loss": o.cls_weight * cls + o.patch_weight * patch,
            "cls_loss": cls,
            "patch_loss": patch,
            "health/teacher_entropy": entropy,
            "health/information": information,
            "health/kl": cls.detach() - entropy * math.log(q_cls.shape[-1]),
            "health/feature_std": spread(pooled[: masks.masked.shape[0]]),
        }

    @torch.no_grad()
    def _teach(self, images: Tensor, index: Tensor, s: Mapping[str, float]) -> tuple[Tensor, Tensor]:
        """Centred and sharpened: of the views [G, B, K], and of the masked patches [M, K']; counts them for the centres."""
        teacher = self.teacher
        features = teacher.backbone(images.flatten(0, 1))  # of G*B images
        t = at_least_float32(teacher.head.cls(features.pooled))  # [G*B, K]
        x = teacher.head.of_patches.bottleneck(tokens_of(teacher.backbone, features))  # [G*B*T, bottleneck]
        prototypes = teacher.head.of_patches.last_layer
        z = at_least_float32(prototypes(x[index]))  # [M, K']
        # the centre is of all patches, masked or not; prototypes are linear, so the mean logit is the mean's logit
        self.patch_sum += at_least_float32(prototypes(x.mean(0, keepdim=True)))[0] * len(t)
        self.batch_sum += t.sum(0)
        self.batch_count += len(t)
        q_cls = teacher_probabilities(t, self.center, s["teacher_temp"]).unflatten(0, images.shape[:2])
        return q_cls, teacher_probabilities(z, self.patch_center, s["patch_temp"])

    @torch.no_grad()
    def after_step(self, s: Mapping[str, float], ok: Tensor) -> None:
        """EMA of the teacher; EMA of both centres from the means over the global batch."""
        ema_update(self.teacher, self.student, s["momentum"], ok)
        dist.all_reduce_(self.batch_count)
        momenta = (self.options.center_momentum, self.options.patch_center_momentum)
        pairs = ((self.center, self.batch_sum), (self.patch_center, self.patch_sum))
        for (center, total), momentum in zip(pairs, momenta):
            move_center(center, total, self.batch_count, momentum, ok)
        self.batch_count.zero_()

    def export(self) -> Backbone:
        """A copy of the teacher's backbone in eval mode."""
        return copy.deepcopy(self.teacher.backbone).eval()

    def backbones(self) -> dict[str, Backbone]:
        """Student and teacher."""
        return {"student": self.student.backbone, "teacher": self.teacher.backbone}

    def classifiers(self) -> dict[str, nn.Module]:
        """None: prototypes are no classes."""
        return {}
