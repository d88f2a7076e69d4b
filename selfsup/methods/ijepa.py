"""I-JEPA: prediction in representation space (Assran et al., 2023, "Self-Supervised Learning from Images with a
Joint-Embedding Predictive Architecture").

One view of an image, hardly augmented. The target encoder, a moving average of the context encoder, sees all of it; the
context encoder sees a large block of patches without those of a few target blocks. From what it makes of them a narrow
predictor tells the target encoder's features of each target block.
"""

import copy
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from selfsup.backbones import Backbone
from selfsup.backbones.masked import check_maskable, final_norm
from selfsup.backbones.stochastic import key_stochastic_layers
from selfsup.config import Config, Positive, Probability, Range, Section
from selfsup.data.masks import to_device
from selfsup.data.multiblock import Blocks, MultiBlock, draw
from selfsup.data.views import View, multicrop
from selfsup.ema import ema_update
from selfsup.errors import UserError
from selfsup.losses.latent import LatentForm, latent_loss, layer_normed
from selfsup.methods.contract import Labels, ViewBatch
from selfsup.methods.network import Network, build_backbone, drawing, has_batch_statistics, momentum_copy, spread
from selfsup.predictors import Predictor
from selfsup.schedules import Plan, Schedule, linear


class IJEPAOptions(Section):
    """Options of I-JEPA; defaults are the paper's (section 3 and appendix A) and, for the loss, the published code's."""

    targets: Positive = 4
    """Blocks to predict."""
    target_scale: Range = (0.15, 0.2)
    """Area of a target block as a fraction of the patches."""
    target_ratio: Range = (0.75, 1.5)
    """Height / width of a target block."""
    context_scale: Range = (0.85, 1.0)
    """Area of the context block, before the targets are taken out."""
    min_context: Positive = 10
    """Patches below which an image's blocks are drawn again. Contexts are cut to the smallest of the global batch: of 2048
    images with 16 x 16 patches some 45 are left, of 128 some 65; 60 here makes it 60."""
    predictor_dim: Positive = 384
    predictor_depth: Positive = 6
    """6 for a ViT-B, 12 for a ViT-L or larger."""
    predictor_heads: Positive | None = None
    """Default: as many as the encoder has."""
    loss: LatentForm = "smooth_l1"
    momentum: Probability = 0.996
    """Of the target encoder; linear to momentum_end."""
    momentum_end: Probability = 1.0


class IJEPA(nn.Module):
    """`student`: context encoder and predictor (its head); `teacher`: target encoder, which needs no head."""

    Options = IJEPAOptions
    labels: ClassVar[Labels] = "unused"

    def __init__(self, config: Config, options: IJEPAOptions) -> None:
        super().__init__()
        self.options, self.seed = options, config.seed
        self._views = [view for view in multicrop(config.views) if view.kind == "global"]  # local ones are not made
        if not self._views:
            raise UserError("views.global.count=0: method=ijepa predicts parts of global views; give 1")
        backbone = build_backbone(config)
        self.suits(backbone)
        self.grid = backbone.token_grid(config.views.global_.size)
        heads = options.predictor_heads or int(backbone.model.blocks[0].attn.num_heads)  # type: ignore[union-attr, index]
        if options.predictor_dim % heads or options.predictor_dim % 4:
            raise UserError(
                f"method.predictor_dim={options.predictor_dim}: not a multiple of 4 and of method.predictor_heads={heads} "
                "(the encoder's, unless given); change one of them"
            )
        predictor = Predictor(
            backbone.embed_dim, self.grid, dim=options.predictor_dim, depth=options.predictor_depth, heads=heads
        )
        self.student = Network(backbone, predictor)
        self.teacher = Network(momentum_copy(backbone), nn.Identity())
        self.random = key_stochastic_layers(self.student, config.seed)
        self.batch_statistics = has_batch_statistics(self.student)

    @staticmethod
    def suits(backbone: Backbone) -> None:
        """Raise UserError for one whose patches cannot be hidden."""
        check_maskable(backbone, "method=ijepa")

    def views(self) -> list[View]:
        """Global crops alone."""
        return self._views

    def schedules(self, plan: Plan) -> dict[str, Schedule]:
        """The target encoder's momentum."""
        return {"momentum": linear(self.options.momentum, self.options.momentum_end, plan.steps)}

    def blocks(self, batch: ViewBatch) -> Blocks:
        """Those of the micro-batch's images, [V*B, ...], views first, out of the whole global batch's."""
        o = self.options
        kind = MultiBlock(o.targets, o.target_scale, o.target_ratio, o.context_scale, o.min_context)
        views, whole = len(self._views), batch.global_batch
        mine = (np.arange(views)[:, None] * whole + batch.on_host()).reshape(-1)  # [V, B] -> [V*B]
        return Blocks(*(part[mine] for part in draw(kind, self.grid, views * whole, self.seed, batch.step)))

    def forward(self, batch: ViewBatch, s: Mapping[str, float]) -> dict[str, Tensor]:
        """See `contract.Method.forward`. images: global [V, B, C, S, S]."""
        images = batch.images[0].flatten(0, 1)  # [V*B, C, S, S]
        context, wanted = (to_device(part, images.device) for part in self.blocks(batch))  # [V*B, C], [V*B, M, T]

        with torch.no_grad():
            features = self.teacher.backbone(images)
            tokens = features.patches.flatten(2).transpose(1, 2)  # [V*B, D, h, w] -> [V*B, h*w, D]
            tokens = layer_normed(final_norm(self.teacher.backbone, tokens))
            index = wanted.flatten(1)[..., None].expand(-1, -1, tokens.shape[-1])  # [V*B, M*T, D]
            targets = tokens.gather(1, index).unflatten(1, wanted.shape[1:])  # [V*B, M, T, D]

        with drawing(self.random, batch.step, batch.keys(0)):
            seen = self.student.backbone.encode_visible(images, context)  # [V*B, prefix + C, D]
        predicted = self.student.head(seen[:, -context.shape[1] :], context, wanted)  # [V*B, M, T, D]
        return {
            "loss": latent_loss(predicted, targets, self.options.loss),
            "health/feature_std": spread(features.pooled),
        }

    @torch.no_grad()
    def after_step(self, s: Mapping[str, float], ok: Tensor) -> None:
        """EMA of the target encoder."""
        ema_update(self.teacher.backbone, self.student.backbone, s["momentum"], ok)

    def export(self) -> Backbone:
        """A copy of the target encoder in eval mode, as the paper evaluates it."""
        return copy.deepcopy(self.teacher.backbone).eval()

    def backbones(self) -> dict[str, Backbone]:
        """Context encoder and target encoder."""
        return {"student": self.student.backbone, "teacher": self.teacher.backbone}

    def classifiers(self) -> dict[str, nn.Module]:
        """None: nothing tells classes."""
        return {}
