"""TimeSformer, a ViT for clips (Bertasius et al., 2021, "Is Space-Time Attention All You Need for Video Understanding?").

Section 3 of the paper, with the names of its code (github.com/facebookresearch/TimeSformer), so that its checkpoints load:

divided   each block attends over time at its own place, then over space in its own frame ("T+S", equations 10 and 11)
joint     every token attends to all places of all frames ("ST")
space     each frame by itself; the frames are averaged in the end ("S"): what is left when time is not looked at

Parts are timm's (`Block`, `Attention`, `PatchEmbed`). The names are known to timm once this module is imported, which
`import selfsup` of any backbone does; bare timm does not know them.
"""

from typing import Any, Literal

import torch
from timm.layers import PatchEmbed
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import Attention, Block, init_weights_vit_timm, named_apply
from torch import Tensor, nn

from selfsup.backbones.positions import resample_tokens, resize_matrix
from selfsup.backbones.timesformer_keys import from_transformers

SpaceTime = Literal["divided", "joint", "space"]


class DividedBlock(Block):
    """timm's block with attention over time before that over space."""

    def __init__(self, dim: int, num_heads: int, *, first: bool, **options: Any) -> None:
        super().__init__(dim, num_heads, **options)
        self.temporal_norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.temporal_attn = Attention(dim, num_heads=num_heads, qkv_bias=options["qkv_bias"])
        self.temporal_fc = nn.Linear(dim, dim)
        self.starts_idle = not first  # as in the published code: all but the first begin as blocks of an image

    def forward(self, x: Tensor, frames: int) -> Tensor:  # type: ignore[override]
        """[B, 1 + t*n, D] -> the same; t = frames, n places."""
        batch, cls, patches = x.shape[0], x[:, :1], x[:, 1:].unflatten(1, (frames, -1))  # [B, t, n, D]
        y = patches.transpose(1, 2).flatten(0, 1)  # [B*n, t, D]
        y = self.drop_path1(self.temporal_attn(self.temporal_norm1(y)))
        patches = patches + self.temporal_fc(y.unflatten(0, (batch, -1)).transpose(1, 2))  # [B, t, n, D]
        z = torch.cat([cls[:, None].expand(-1, frames, -1, -1), patches], dim=2).flatten(0, 1)  # [B*t, 1 + n, D]
        z = self.drop_path1(self.attn(self.norm1(z))).unflatten(0, (batch, frames))  # [B, t, 1 + n, D]
        cls = cls + z[:, :, 0].mean(dim=1, keepdim=True)  # CLS is one for all frames
        x = torch.cat([cls, (patches + z[:, :, 1:]).flatten(1, 2)], dim=1)  # [B, 1 + t*n, D]
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class TimeSformer(nn.Module):
    """Clips [B, C, T, H, W], or as the loader moves them [B, T*C, H, W] -> class scores or, without classes, [B, D].

    Any T, and any H and W that are multiples of the patch: embeddings of place and time are resampled (bicubic, antialiased;
    the published code takes the nearest). An image [B, C, H, W] is a clip of one frame. time_init: standard deviation of
    the time embeddings at the start; zero, as published, tells frames apart late, which small nets on little data never do.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        frames: int = 8,
        attention: SpaceTime = "divided",
        time_init: float = 0.0,
        global_pool: Literal["token", "avg"] = "token",
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if attention not in ("divided", "joint", "space"):
            raise ValueError(f"attention={attention!r}; it is divided, joint or space")
        if global_pool not in ("token", "avg"):
            raise ValueError(f"global_pool={global_pool!r}; it is token or avg")
        if frames < 1 or embed_dim % num_heads:
            raise ValueError(f"frames={frames} is 1 or more, and num_heads={num_heads} divides embed_dim={embed_dim}")
        self.frames, self.attention, self.in_chans, self.global_pool = frames, attention, in_chans, global_pool
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.num_classes = num_classes
        self.feature_info = [
            {"module": f"blocks.{i}", "num_chs": embed_dim, "reduction": patch_size} for i in range(depth)
        ]
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim, strict_img_size=False)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.patch_embed.num_patches, embed_dim))
        if attention != "space":
            self.time_embed = nn.Parameter(torch.zeros(1, frames, embed_dim))
            nn.init.normal_(self.time_embed, std=time_init)
        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        options: dict[str, Any] = {"mlp_ratio": mlp_ratio, "qkv_bias": qkv_bias}
        options["norm_layer"] = lambda width, **more: nn.LayerNorm(width, eps=1e-6, **more)
        self.blocks = nn.ModuleList(
            DividedBlock(embed_dim, num_heads, first=i == 0, drop_path=rate, **options)
            if attention == "divided"
            else Block(embed_dim, num_heads, drop_path=rate, **options)
            for i, rate in enumerate(rates)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        named_apply(init_weights_vit_timm, self)
        for parameter in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(parameter, std=0.02)
        for block in self.blocks:
            if isinstance(block, DividedBlock) and block.starts_idle:
                nn.init.zeros_(block.temporal_fc.weight)

    # ------------------------------------------------------------------------------------------------ what timm expects

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Where blocks begin, as in timm's ViT."""
        return {"stem": r"^cls_token|pos_embed|time_embed|patch_embed", "blocks": [(r"^blocks\.(\d+)", None)]}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """It is done from outside: see `checkpointing.py`."""

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Another last layer, or none."""
        self.num_classes = num_classes
        self.head = nn.Linear(self.embed_dim, num_classes) if num_classes else nn.Identity()

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.head

    def forward(self, x: Tensor) -> Tensor:
        """Clips -> [B, classes] or [B, D]."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Clips -> tokens [B, 1 + T*h*w, D] after the norm: CLS, then frame after frame."""
        x, frames = self._embed(x)
        for block in self.blocks:
            x = block(x, frames) if self.attention == "divided" else block(x)
        return self.norm(self._together(x, frames))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens -> [B, classes]; without classes, or with pre_logits, what is pooled [B, D]."""
        x = self.head_drop(x[:, 0] if self.global_pool == "token" else x[:, 1:].mean(dim=1))
        return x if pre_logits else self.head(x)

    def forward_intermediates(
        self, x: Tensor, indices: list[int], return_prefix_tokens: bool = False, norm: bool = False, **unused: Any
    ) -> list[Any]:
        """After the blocks `indices`: maps [B, D, T, h, w], or with return_prefix_tokens pairs of these and CLS [B, 1, D]."""
        grid = self.grid(x)
        x, frames = self._embed(x)
        out: list[Any] = []
        for i, block in enumerate(self.blocks[: max(indices) + 1]):
            x = block(x, frames) if self.attention == "divided" else block(x)
            if i in indices:
                tokens = self._together(x, frames)
                tokens = self.norm(tokens) if norm else tokens
                maps = tokens[:, 1:].transpose(1, 2).unflatten(2, (frames, *grid))  # [B, D, T, h, w]
                out.append((maps, tokens[:, :1]) if return_prefix_tokens else maps)
        return out

    # ------------------------------------------------------------------------------------------------------- internals

    def grid(self, x: Tensor) -> tuple[int, int]:
        """(h, w) of the patches of clips x."""
        p, q = self.patch_embed.patch_size
        return x.shape[-2] // p, x.shape[-1] // q

    def _embed(self, x: Tensor) -> tuple[Tensor, int]:
        """Clips -> tokens with positions: [B, 1 + T*n, D], of separate frames [B*T, 1 + n, D]; and T."""
        grid, batch = self.grid(x), x.shape[0]
        if x.ndim == 5:
            x = x.transpose(1, 2)  # [B, C, T, H, W] -> [B, T, C, H, W]
        else:
            x = x.unflatten(1, (-1, self.in_chans))  # [B, T*C, H, W] -> [B, T, C, H, W]
        frames = x.shape[1]
        x = self.patch_embed(x.flatten(0, 1))  # [B*T, n, D]
        fit = self.training and torch.is_grad_enabled()
        pos = resample_tokens(self.pos_embed, self.patch_embed.grid_size, grid, "timm", 1, by_matrix=fit)
        x, cls = x + pos[:, 1:], self.cls_token + pos[:, :1]
        if self.attention == "space":
            return torch.cat([cls.expand(batch * frames, -1, -1), x], dim=1), frames
        x = x.unflatten(0, (batch, frames)) + resample_time(self.time_embed, frames)[:, :, None]  # [B, T, n, D]
        return torch.cat([cls.expand(batch, -1, -1), x.flatten(1, 2)], dim=1), frames

    def _together(self, x: Tensor, frames: int) -> Tensor:
        """[B, 1 + T*n, D]; of separate frames [B*T, 1 + n, D] CLS is the mean, as in the published code."""
        if self.attention != "space":
            return x
        x = x.unflatten(0, (-1, frames))  # [B, T, 1 + n, D]
        return torch.cat([x[:, :, 0].mean(dim=1, keepdim=True), x[:, :, 1:].flatten(1, 2)], dim=1)


def resample_time(embedding: Tensor, frames: int) -> Tensor:
    """[1, T, D] -> [1, frames, D], as embeddings of place are resampled, by a product: its backward is deterministic."""
    if embedding.shape[1] == frames:
        return embedding
    with torch.no_grad():
        matrix = resize_matrix(embedding.shape[1], frames, "timm", embedding.device).to(embedding.dtype)
    with torch.autocast(embedding.device.type, enabled=False):
        return torch.einsum("it,ntd->nid", matrix, embedding)


def checkpoint_filter_fn(state: dict[str, Tensor], model: TimeSformer) -> dict[str, Tensor]:
    """Weights under the names of `transformers`, and time embeddings of another length, as this model takes them."""
    state = from_transformers(state)
    time = state.get("time_embed")
    if time is not None and time.ndim == 3 and hasattr(model, "time_embed"):
        state["time_embed"] = resample_time(time.float(), model.frames)
    return state


# ------------------------------------------------------------------------------------------------------------- names

_CFG: dict[str, Any] = {
    "input_size": (3, 224, 224),
    "fixed_input_size": True,
    "num_classes": 400,
    "pool_size": None,
    "crop_pct": 1.0,
    "interpolation": "bicubic",
    "mean": (0.45, 0.45, 0.45),  # of the published configurations, DATA.MEAN and DATA.STD
    "std": (0.225, 0.225, 0.225),
    "first_conv": "patch_embed.proj",
    "classifier": "head",
    "license": "cc-by-nc-4.0",
}
_SIZES = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}
_CFGS: dict[str, Any] = {f"timesformer_{size}_patch16_224": _CFG for size in _SIZES} | {"timesformer": _CFG}
default_cfgs = generate_default_cfgs(_CFGS)


def _create(variant: str, size: str, pretrained: bool, options: dict[str, Any]) -> TimeSformer:
    width, heads = _SIZES[size]
    values = {"embed_dim": width, "num_heads": heads, **options}
    return build_model_with_cfg(TimeSformer, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **values)


@register_model
def timesformer_tiny_patch16_224(pretrained: bool = False, **options: Any) -> TimeSformer:
    """Of the size of ViT-Ti."""
    return _create("timesformer_tiny_patch16_224", "tiny", pretrained, options)


@register_model
def timesformer_small_patch16_224(pretrained: bool = False, **options: Any) -> TimeSformer:
    """Of the size of ViT-S."""
    return _create("timesformer_small_patch16_224", "small", pretrained, options)


@register_model
def timesformer_base_patch16_224(pretrained: bool = False, **options: Any) -> TimeSformer:
    """Of the size of ViT-B: the paper's; 121 M parameters with divided attention."""
    return _create("timesformer_base_patch16_224", "base", pretrained, options)


@register_model
def timesformer(pretrained: bool = False, **options: Any) -> TimeSformer:
    """The paper's."""
    return _create("timesformer", "base", pretrained, options)
