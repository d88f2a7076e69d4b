"""Networks that tell the features of patches that were not seen, from those of patches that were."""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn


def sincos_positions(dim: int, grid: tuple[int, int]) -> Tensor:
    """Fixed position embeddings [rows * columns, dim], float32: half of it for the column, half for the row.

    Each half holds sines, then cosines, of the coordinate at frequencies 10,000^(-i / (dim / 4)), as MAE's (He et al.,
    2022; after Vaswani et al., 2017, section 3.5). dim: a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"sine and cosine of two coordinates need a multiple of 4 dimensions, not {dim}")
    frequencies = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))  # [dim / 4]
    halves = []
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")  # [h, w]
    for coordinate in (columns, rows):
        angles = coordinate.reshape(-1, 1) * frequencies  # [h*w, dim / 4]
        halves += [angles.sin(), angles.cos()]
    return torch.cat(halves, dim=1).float()


def init_transformer(module: nn.Module) -> None:
    """Truncated normal weights of std 0.02 and zero biases; the output layers of block i divided by sqrt(2 i), i from 1.

    As in the published code of I-JEPA (and BEiT): residual branches then add up to about the same at any depth.
    """
    for child in module.modules():
        if isinstance(child, nn.Linear):
            nn.init.trunc_normal_(child.weight, std=0.02)
            if child.bias is not None:
                nn.init.zeros_(child.bias)
    blocks: list[Any] = [child for child in module.modules() if isinstance(child, (Block, CrossBlock))]
    with torch.no_grad():
        for i, block in enumerate(blocks, start=1):
            block.attn.proj.weight.div_((2.0 * i) ** 0.5)
            block.mlp.fc2.weight.div_((2.0 * i) ** 0.5)


class Predictor(nn.Module):
    """A narrow ViT on the features of visible patches and, for the patches of one block, mask tokens with positions.

    I-JEPA's (Assran et al., 2023, section 3, "Prediction"; appendix A). Each block of an image is predicted by itself.
    """

    positions: Tensor

    def __init__(self, in_dim: int, grid: tuple[int, int], *, dim: int, depth: int, heads: int) -> None:
        super().__init__()
        self.embed = nn.Linear(in_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(dim))
        self.blocks = nn.ModuleList(Block(dim, heads, qkv_bias=True) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.proj = nn.Linear(dim, in_dim)
        self.register_buffer("positions", sincos_positions(dim, grid), persistent=False)
        init_transformer(self)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(self, seen: Tensor, where: Tensor, wanted: Tensor) -> Tensor:
        """Features seen [B, C, D] of the patches where [B, C] -> those of the blocks wanted [B, M, T]: [B, M, T, D]."""
        blocks, length = wanted.shape[1:]
        x = self.embed(seen)
        x = x + self.positions[where].to(x.dtype)  # [B, C, d]
        x = x[:, None].expand(-1, blocks, -1, -1)  # [B, M, C, d]
        asked = self.mask_token + self.positions[wanted]  # [B, M, T, d]
        x = torch.cat([x, asked.to(x.dtype)], dim=2).flatten(0, 1)  # [B*M, C+T, d]
        for block in self.blocks:
            x = block(x)
        x = self.proj(self.norm(x[:, -length:]))  # [B*M, T, D]
        return x.unflatten(0, (-1, blocks))


class CrossAttention(nn.Module):
    """Each query sees all of the context, and no other query; heads side by side, no biases."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim, bias=False) for _ in range(4))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x [B, T, d], context [B, C, d] -> [B, T, d]."""
        q, k, v = (
            layer(y).unflatten(2, (self.heads, -1)).transpose(1, 2)  # [B, T, d] -> [B, heads, T, d / heads]
            for layer, y in ((self.q, x), (self.k, context), (self.v, context))
        )
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class CrossBlock(nn.Module):
    """Cross-attention and MLP, each after a norm and around a residual connection that may be dropped."""

    def __init__(self, dim: int, heads: int, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(dim, eps=1e-5), nn.RMSNorm(dim, eps=1e-5)
        self.attn = CrossAttention(dim, heads)
        self.mlp = Mlp(dim, 4 * dim, bias=False)
        self.drop_path1, self.drop_path2 = DropPath(drop_path), DropPath(drop_path)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x [B, T, d], context [B, C, d] -> [B, T, d]."""
        x = x + self.drop_path1(self.attn(self.norm1(x), context))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class CrossPredictor(nn.Module):
    """Mask tokens with positions, which look at what the encoder made of the visible patches, and not at one another.

    CAPI's (Darcet et al., 2025, section 3.3). Since no patch depends on which others are asked for, few need to be. The paper
    turns queries and keys by their positions (RoPE), here fixed positions are added to both; its norm at the end changes no
    direction, which is all that is used of a prediction.
    """

    positions: Tensor

    def __init__(
        self, in_dim: int, grid: tuple[int, int], *, dim: int, depth: int, heads: int, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(in_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(dim))
        self.blocks = nn.ModuleList(CrossBlock(dim, heads, drop_path) for _ in range(depth))
        self.register_buffer("positions", sincos_positions(dim, grid), persistent=False)
        init_transformer(self)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(self, seen: Tensor, where: Tensor, wanted: Tensor) -> Tensor:
        """Tokens seen [B, prefix + C, D] of the patches where [B, C] -> features of the patches wanted [B, T]: [B, T, d]."""
        context = self.embed(seen)  # [B, prefix + C, d]
        prefix = context[:, : -where.shape[1]]
        placed = context[:, -where.shape[1] :] + self.positions[where].to(context.dtype)
        context = torch.cat([prefix, placed], dim=1)
        x = (self.mask_token + self.positions[wanted]).to(context.dtype)  # [B, T, d]
        for block in self.blocks:
            x = block(x, context)
        return x
