"""SimMIM: a simple framework for masked image modeling (Xie et al., 2022).

Large squares of an image are hidden, the backbone sees all of it with mask tokens in their places, and one linear layer
predicts the raw pixels there from the last feature map. The loss is their mean absolute error. Section 3 of the paper; of
several views of an image each is predicted by itself.

A plain ViT gets the mask token in place of its patches' embeddings. Any other backbone, a ConvNet or a pyramid of windows, has
no embeddings that could be replaced before they are mixed; it gets images whose hidden pixels have a learnt colour.
"""

import copy
import math
from collections.abc import Mapping
from typing import Annotated, ClassVar

import numpy as np
import torch
from pydantic import Field
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from selfsup.backbones import Backbone, Features
from selfsup.backbones.masked import check_maskable
from selfsup.backbones.stages import map_shapes
from selfsup.backbones.stochastic import key_stochastic_layers
from selfsup.config import Config, Positive, Section
from selfsup.data.masks import Masks, magnified, random_masks
from selfsup.data.views import View, multicrop
from selfsup.errors import UserError
from selfsup.losses.reconstruction import Distance, patchify, reconstruction_loss
from selfsup.methods.contract import Labels, ViewBatch
from selfsup.methods.network import Network, build_backbone, drawing, has_batch_statistics, spread
from selfsup.methods.patches import tokens_of
from selfsup.schedules import Plan, Schedule


class SimMIMOptions(Section):
    """Options of SimMIM; defaults are those of the paper (section 4.1)."""

    mask_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.6
    mask_patch_size: Positive = 32
    """Pixels along the side of a hidden square: a multiple of the backbone's patch, or stride."""
    distance: Distance = "l1"
    """l1: absolute difference; l2: squared (table 4 of the paper)."""


class Predictor(nn.Module):
    """A linear layer from a place of the last map to its pixels; and what stands for hidden ones."""

    def __init__(self, in_dim: int, pixels: int, token_dim: int) -> None:
        super().__init__()
        self.mask_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(token_dim), std=0.02))
        self.linear = nn.Linear(in_dim, pixels)

    def forward(self, tokens: Tensor) -> Tensor:
        """[M, D] -> [M, P]."""
        return self.linear(tokens)


class SimMIM(nn.Module):
    """`student`: the backbone, and the predictor as its head."""

    Options = SimMIMOptions
    labels: ClassVar[Labels] = "unused"

    def __init__(self, config: Config, options: SimMIMOptions) -> None:
        super().__init__()
        self.options, self.seed = options, config.seed
        self._views = multicrop(config.views)
        backbone = build_backbone(config)
        self.suits(backbone)
        self.embeds = _embeds(backbone)
        self.stride = backbone.stride
        for view in self._views:
            self._check(view.size, backbone.name)
        depth = map_shapes(backbone, [])[0][0]
        pixels = self.stride**2 * backbone.in_chans
        head = Predictor(depth, pixels, backbone.embed_dim if self.embeds else backbone.in_chans)
        self.student = Network(backbone, head)
        self.random = key_stochastic_layers(self.student, config.seed)
        self.batch_statistics = has_batch_statistics(self.student)

    @staticmethod
    def suits(backbone: Backbone) -> None:
        """Raise UserError for one whose last map is no grid of squares of its images, or whose patches are mixed too early."""
        if _embeds(backbone):
            check_maskable(backbone, "SimMIM")
        if backbone.sees == "clips":
            raise UserError(
                f"backbone.name={backbone.name}: SimMIM predicts images, and it sees clips; choose another backbone"
            )
        stride, (_, height, width) = backbone.stride, map_shapes(backbone, [])[0]
        if backbone.image_size != (height * stride, width * stride):
            raise UserError(
                f"backbone.name={backbone.name}: its last map, {height}x{width} for images of {backbone.image_size} pixels, is "
                "no grid of squares, which SimMIM predicts; choose another backbone"
            )

    def views(self) -> list[View]:
        """Global crops, then local ones."""
        return self._views

    def schedules(self, plan: Plan) -> dict[str, Schedule]:
        """None."""
        return {}

    def forward(self, batch: ViewBatch, s: Mapping[str, float]) -> dict[str, Tensor]:
        """See `contract.Method.forward`. images: [V, B, C, S, S] of each kind."""
        backbone, first = self.student.backbone, 0
        losses: list[Tensor] = []
        pooled: list[Tensor] = []
        for kind, images in enumerate(batch.images):
            masks = self._masks(batch, range(first, first + len(images)), images.shape[3])
            flat = images.flatten(0, 1)  # [V*B, C, S, S]
            with drawing(self.random, batch.step, batch.keys(kind, first)):
                features = self._see(flat, masks)
            tokens = tokens_of(backbone, features)[masks.index]  # [M, D]
            target = patchify(flat, self.stride).flatten(0, 1)[masks.index]  # [V*B*T, P] -> [M, P]
            loss = reconstruction_loss(self.student.head(tokens), target, self.options.distance)
            losses.append(len(images) * loss)
            pooled.append(features.pooled.detach())
            first += len(images)
        # not among what is watched for collapse: to predict pixels from them, features need not spread, and they cannot collapse
        return {"loss": torch.stack(losses).sum() / first, "feature_std": spread(torch.cat(pooled))}

    def _see(self, images: Tensor, masks: Masks) -> Features:
        """Features of images [N, C, S, S] of which tokens masks.masked [N, T] are hidden."""
        token = self.student.head.mask_token
        if self.embeds:
            return self.student.backbone.forward_masked(images, masks.masked, token)
        side = images.shape[2] // self.stride
        squares = masks.masked.reshape(-1, 1, side, side)  # [N, T] -> [N, 1, h, w]
        hidden = squares.repeat_interleave(self.stride, 2).repeat_interleave(self.stride, 3)  # [N, 1, S, S]
        return self.student.backbone(torch.where(hidden, token.to(images.dtype)[:, None, None], images))

    def _masks(self, batch: ViewBatch, views: range, size: int) -> Masks:
        """Squares are drawn, as many as the ratio asks for, rounded up; then the tokens in each of them are masked."""
        side = size // self.options.mask_patch_size
        count = math.ceil(side * side * self.options.mask_ratio)
        places = batch.on_host()
        rows = [random_masks(self.seed, batch.step, places, v, tokens=side * side, count=count) for v in views]
        masked = magnified(np.concatenate(rows), (side, side), self.options.mask_patch_size // self.stride)
        return Masks.of(masked, batch.positions.device)

    def _check(self, size: int, name: str) -> None:
        square = self.options.mask_patch_size
        if square % self.stride:
            fits = max(1, round(square / self.stride)) * self.stride
            raise UserError(
                f"method.mask_patch_size={square} is no multiple of the {self.stride} pixels that a place of {name}'s last map "
                f"stands for; use {fits}"
            )
        if size % square:
            raise UserError(
                f"method.mask_patch_size={square}: views of {size} pixels are not made of such squares; give sizes that are a "
                "multiple of it"
            )

    def after_step(self, s: Mapping[str, float], ok: Tensor) -> None:
        """Nothing follows the student."""

    def export(self) -> Backbone:
        """A copy of the backbone in eval mode."""
        return copy.deepcopy(self.student.backbone).eval()

    def backbones(self) -> dict[str, Backbone]:
        """The backbone."""
        return {"student": self.student.backbone}

    def classifiers(self) -> dict[str, nn.Module]:
        """None."""
        return {}


def _embeds(backbone: Backbone) -> bool:
    """Whether it has patches that a token can stand for."""
    return isinstance(backbone.model, VisionTransformer)
