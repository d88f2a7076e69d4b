"""Vision transformers that do not see all of an image: patches replaced by a mask token, or left out.

For timm's VisionTransformer and its kin (registers, a distillation token, any image size). The mask token belongs to the
method: an exported backbone has none.
"""

from typing import TYPE_CHECKING, Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from selfsup.backbones import packed
from selfsup.backbones.features import Features
from selfsup.backbones.stochastic import restart
from selfsup.errors import UserError

if TYPE_CHECKING:
    from selfsup.backbones.backbone import Backbone


def check_maskable(backbone: "Backbone", method: str = "this method") -> None:
    """Raise UserError if patches cannot be hidden from this backbone; `method` says who asks."""
    model = backbone.model
    if len(backbone.patch_shape) == 3 and method not in ("MAE", "this method"):
        raise UserError(f"backbone.name={backbone.name}: {method} hides blocks of images; of volumes method=mae does")
    if not isinstance(model, VisionTransformer):
        kind = type(model).__name__
        raise UserError(
            f"backbone.name={backbone.name}: {method} hides patches before the layers that mix them, which {kind} does not "
            "have apart; choose a plain ViT, such as vit_small_patch16_224"
        )
    if hasattr(model.patch_embed, "backbone"):
        raise UserError(
            f"backbone.name={backbone.name}: {method} hides patches, and the ConvNet before this transformer sees across "
            "them; choose a plain ViT, such as vit_small_patch16_224"
        )


def token_grid(backbone: "Backbone", height: int, width: int) -> tuple[int, int]:
    """Rows and columns of patch tokens of an image of this size."""
    check_maskable(backbone)
    embed: Any = backbone.model.patch_embed
    (ph, pw) = embed.patch_size
    return (-(-height // ph), -(-width // pw)) if embed.dynamic_img_pad else (height // ph, width // pw)


def forward_masked(backbone: "Backbone", images: Tensor, hidden: Tensor, mask_token: Tensor) -> Features:
    """`backbone(images)` with the embeddings of hidden patches replaced before positions are added (as in BEiT).

    images: [B, C, H, W]; hidden: bool [B, T]; mask_token: [D].
    """
    model = _start(backbone, images)
    x = packed._patches(model.patch_embed, images)  # [B, h, w, D] or [B, T, D]
    where = hidden.reshape(*x.shape[:-1], 1)  # [B, T] -> [B, h, w, 1] or [B, T, 1]
    x = torch.where(where, mask_token.to(x.dtype), x)
    out = model.norm(_blocks(model, model.norm_pre(model._pos_embed(x))))  # [B, prefix + T, D]
    return backbone._split(out, model.forward_head(out), images)


def encode_visible(backbone: "Backbone", images: Tensor, keep: Tensor) -> Tensor:
    """Tokens [B, prefix + k, D], after the final norm, of the patches `keep` (int64 [B, k]) alone (MAE, section 3).

    The others are never computed. CLS, registers and a distillation token come first. Where the model normalises after
    pooling (fc_norm), that norm is the final one.
    """
    return final_norm(backbone, _visible(backbone, images, keep))


def embed_visible(backbone: "Backbone", images: Tensor, keep: Tensor) -> Tensor:
    """`Features.pooled` [B, D] of images of which the patches `keep` (int64 [B, k]) alone are seen."""
    return backbone.model.forward_head(_visible(backbone, images, keep))  # type: ignore[operator]


def _visible(backbone: "Backbone", images: Tensor, keep: Tensor) -> Tensor:
    model = _start(backbone, images)
    x = model._pos_embed(packed._patches(model.patch_embed, images))  # [B, prefix + T, D]
    prefix = model.num_prefix_tokens
    patches = x[:, prefix:].gather(1, keep[..., None].expand(-1, -1, x.shape[-1]))  # [B, k, D]
    x = torch.cat([x[:, :prefix], patches], dim=1) if prefix else patches
    return model.norm(_blocks(model, model.norm_pre(x)))


def final_norm(backbone: "Backbone", tokens: Tensor) -> Tensor:
    """The norm that the model applies after pooling, if it is there that it has one, on tokens [..., D]."""
    norm: Any = getattr(backbone.model, "fc_norm", None)
    return tokens if norm is None or isinstance(norm, nn.Identity) else norm(tokens)


def _start(backbone: "Backbone", images: Tensor) -> Any:
    check_maskable(backbone)
    backbone._check(images)
    restart(backbone.model)  # the model itself is not called: its hooks do not run
    return backbone.model


def _blocks(model: Any, x: Tensor) -> Tensor:
    for block in model.blocks:  # called one by one: whoever watches or recomputes a block does so here too
        x = block(x)
    return x
