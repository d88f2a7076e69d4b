"""MAE: masked autoencoders (He et al., 2022, "Masked Autoencoders Are Scalable Vision Learners").

Three quarters of an image's patches are left out. The encoder, the backbone, sees the others alone; a small decoder sees
its tokens and a mask token in each empty place, and predicts the pixels that were there. The loss is of the hidden patches.
Section 3 of the paper; of several views of an image each is reconstructed by itself.
"""

import copy
import math
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from selfsup.backbones import Backbone
from selfsup.backbones.masked import check_maskable
from selfsup.backbones.positions import fix_positions, sincos_positions
from selfsup.backbones.stochastic import StochasticKeys, key_stochastic_layers
from selfsup.backbones.xavier import xavier
from selfsup.config import Config, Positive, Section
from selfsup.data.masks import random_masks, to_device
from selfsup.data.views import View, multicrop
from selfsup.errors import UserError
from selfsup.losses.reconstruction import normalise_patches, patchify, reconstruction_loss
from selfsup.methods.contract import Labels, ViewBatch
from selfsup.methods.network import Network, build_backbone, drawing, has_batch_statistics, spread
from selfsup.schedules import Plan, Schedule


class MAEOptions(Section):
    """Options of MAE; defaults are those of the paper (section 4.1 and appendix A.1)."""

    mask_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.75
    norm_pix: bool = True
    """Predict each patch normalised by its own mean and deviation, not its pixels."""
    decoder_dim: Positive = 512
    decoder_depth: Positive = 8
    decoder_heads: Positive = 16
    fixed_positions: bool = True
    """The encoder's position embeddings are sines and cosines, as the decoder's are, and not trained."""


class Decoder(nn.Module):
    """Transformer blocks over the encoder's tokens and mask tokens; a linear layer to pixels (section 3, "MAE decoder")."""

    def __init__(self, in_dim: int, out_dim: int, dim: int, depth: int, heads: int) -> None:
        super().__init__()
        norm: Any = partial(nn.LayerNorm, eps=1e-6)
        self.embed = nn.Linear(in_dim, dim)
        self.mask_token = nn.Parameter(torch.empty(dim).normal_(std=0.02))
        self.blocks = nn.Sequential(*[Block(dim, heads, qkv_bias=True, norm_layer=norm) for _ in range(depth)])
        self.norm = norm(dim)
        self.predict = nn.Linear(dim, out_dim)
        xavier(self)

    def forward(self, tokens: Tensor, keep: Tensor, hidden: Tensor, grid: tuple[int, ...]) -> Tensor:
        """tokens [N, prefix + k, D] of the patches keep [N, k] -> predictions [N, T - k, P] of the patches hidden [N, T - k].

        Blocks do not know the order of tokens, positions tell: visible ones come first, and nothing is sorted back.
        """
        x = self.embed(tokens)  # [N, prefix + k, d]
        wide = torch.promote_types(x.dtype, torch.float32)  # half precision would tell neighbours apart badly
        positions = sincos_positions(x.shape[2], grid, x.device).to(wide)  # [T, d]
        prefix = tokens.shape[1] - keep.shape[1]
        seen = x[:, prefix:] + positions[keep]  # [N, k, d]
        empty = self.mask_token + positions[hidden]  # [N, T - k, d]
        x = self.norm(self.blocks(torch.cat([x[:, :prefix], seen, empty], dim=1)))  # [N, prefix + T, d]
        return self.predict(x[:, prefix + keep.shape[1] :])


class MAE(nn.Module):
    """`student`: the encoder, and the decoder as its head."""

    Options = MAEOptions
    labels: ClassVar[Labels] = "unused"

    def __init__(self, config: Config, options: MAEOptions) -> None:
        super().__init__()
        self.options, self.seed = options, config.seed
        self._views = multicrop(config.views)
        backbone = build_backbone(config)
        self.suits(backbone)
        if options.decoder_dim % options.decoder_heads:
            raise UserError(
                f"method.decoder_dim={options.decoder_dim} is not a multiple of decoder_heads={options.decoder_heads}"
            )
        for view in self._views:
            self._kept(backbone.token_grid(view.shape))  # type: ignore[arg-type]  # three of volumes
        if options.fixed_positions:
            fix_positions(backbone.model)
        pixels = math.prod(backbone.patch_shape) * backbone.in_chans
        o = options
        head = Decoder(backbone.embed_dim, pixels, o.decoder_dim, o.decoder_depth, o.decoder_heads)
        self.student: Network = Network(backbone, head)
        self.random: StochasticKeys | None = key_stochastic_layers(self.student, config.seed)
        self.batch_statistics = has_batch_statistics(self.student)

    @staticmethod
    def suits(backbone: Backbone) -> None:
        """Raise UserError for one whose patches cannot be left out, or that pools by what MAE would not train."""
        check_maskable(backbone, "MAE")
        if backbone.model.attn_pool is not None:
            raise UserError("backbone.global_pool: MAE trains tokens, no pooling by attention; use token or avg")

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
        encoded: list[Tensor] = []
        for kind, images in enumerate(batch.images):
            flat = images.flatten(0, 1)  # [V*B, C, S, S]
            grid = backbone.grid_of(flat)
            keep, hidden = self._split(batch, range(first, first + len(images)), grid)  # [V*B, k], [V*B, T - k]
            with drawing(self.random, batch.step, batch.keys(kind, first)):
                tokens = backbone.encode_visible(flat, keep)  # [V*B, prefix + k, D]
            prediction = self.student.head(tokens, keep, hidden, grid)  # [V*B, T - k, P]
            target = patchify(backbone.voxels(flat), backbone.patch_shape)  # [V*B, T, P]
            target = target.gather(1, hidden[..., None].expand(-1, -1, target.shape[2]))  # [V*B, T - k, P]
            if self.options.norm_pix:
                target = normalise_patches(target)
            losses.append(len(images) * reconstruction_loss(prediction, target))
            encoded.append(tokens.detach().mean(1))
            first += len(images)
        # not among what is watched for collapse: to predict pixels from them, features need not spread, and they cannot collapse
        return {"loss": torch.stack(losses).sum() / first, "feature_std": spread(torch.cat(encoded))}

    def _kept(self, grid: tuple[int, ...]) -> int:
        """How many patches the encoder sees: rounded down, as in the published code."""
        tokens = math.prod(grid)
        kept = int(tokens * (1 - self.options.mask_ratio))
        if kept < 1:
            raise UserError(
                f"method.mask_ratio={self.options.mask_ratio:g} leaves none of the {tokens} patches of a view; give larger "
                "views, smaller patches or a lower ratio"
            )
        return kept

    def _split(self, batch: ViewBatch, views: range, grid: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Numbers of the patches that are seen, [V*B, k], and of those that are not, [V*B, T - k]; ascending."""
        places, tokens, device = batch.on_host(), math.prod(grid), batch.positions.device
        count = tokens - self._kept(grid)
        hidden = [random_masks(self.seed, batch.step, places, view, tokens=tokens, count=count) for view in views]
        masked = np.concatenate(hidden)  # [V*B, T]
        sides = (np.nonzero(~masked)[1].reshape(len(masked), -1), np.nonzero(masked)[1].reshape(len(masked), -1))
        return to_device(sides[0], device), to_device(sides[1], device)

    def after_step(self, s: Mapping[str, float], ok: Tensor) -> None:
        """Nothing follows the student."""

    def export(self) -> Backbone:
        """A copy of the encoder in eval mode."""
        return copy.deepcopy(self.student.backbone).eval()

    def backbones(self) -> dict[str, Backbone]:
        """The encoder."""
        return {"student": self.student.backbone}

    def classifiers(self) -> dict[str, nn.Module]:
        """None."""
        return {}
