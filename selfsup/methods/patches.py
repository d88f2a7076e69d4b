"""What iBOT and DINOv2 share: heads for CLS and patches, masks of the global views, and what student and teacher see."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from selfsup.backbones import Backbone, Features
from selfsup.backbones.masked import final_norm
from selfsup.backbones.stochastic import StochasticKeys
from selfsup.data.masks import Masks, block_masks, ratios
from selfsup.heads import DINOHead
from selfsup.losses.ibot import patch_loss
from selfsup.methods.contract import ViewBatch
from selfsup.methods.network import drawing
from selfsup.methods.prototypes import views_loss


class Heads(nn.Module):
    """The head of an image's embedding, that of its patches (the same one, or one of its own), and the mask token."""

    def __init__(self, cls: DINOHead, patch: DINOHead | None, dim: int) -> None:
        super().__init__()
        self.cls = cls
        self.patch = patch
        self.mask_token = nn.Parameter(torch.zeros(dim))

    @property
    def of_patches(self) -> DINOHead:
        """`patch`, or the shared one."""
        return self.cls if self.patch is None else self.patch


def draw_masks(
    batch: ViewBatch, seed: int, grid: tuple[int, int], *, probability: float, low: float, high: float, spread: bool
) -> Masks:
    """Block masks of the global views, [G*B] images, views first: some are masked, by a share drawn from [low, high].

    spread: exactly `probability` of the step's images are masked, by ratios spread evenly (DINOv2's code, data/collate.py);
    else each image draws for itself (iBOT, section 3.3).
    """
    images, places = batch.images[0], batch.on_host()
    views, tokens = images.shape[0], grid[0] * grid[1]
    slots = views * batch.global_batch if spread else None
    rows = []
    for view in range(views):
        share: dict[str, Any] = {"probability": probability, "low": low, "high": high, "tokens": tokens}
        counts = ratios(seed, batch.step, places, view, slots=slots, first=view * batch.global_batch, **share)
        rows.append(block_masks(seed, batch.step, places, view, grid=grid, counts=counts))
    return Masks.of(np.concatenate(rows), images.device)


def tokens_of(backbone: Backbone, features: Features) -> Tensor:
    """Patch tokens, normalised, of N images one after the other: [N*T, D]."""
    patches = features.patches.flatten(2).transpose(1, 2)  # [N, D, h, w] -> [N, T, D]
    return final_norm(backbone, patches).flatten(0, 1)


def student_features(
    backbone: Backbone, batch: ViewBatch, masks: Masks, mask_token: Tensor, random: StochasticKeys | None
) -> tuple[Tensor, Tensor]:
    """(embeddings of all views [V*B, D], views first; tokens of the global views' patches [G*B*T, D], images first).

    Global views are seen with mask tokens, local ones as they are.
    """
    images = batch.images[0]  # [G, B, C, S, S]
    with drawing(random, batch.step, batch.keys(0)):
        features = backbone.forward_masked(images.flatten(0, 1), masks.masked, mask_token)
    first, keys = images.shape[0], []
    for kind in range(1, len(batch.images)):
        keys.append(batch.keys(kind, first))
        first += batch.images[kind].shape[0]
    local = [x.flatten(0, 1) for x in batch.images[1:]]
    others = backbone.embed(local, keys, lambda samples: drawing(random, batch.step, samples)) if local else []
    return torch.cat([features.pooled, *others]), tokens_of(backbone, features)


def student_losses(
    heads: Heads,
    pooled: Tensor,
    tokens: Tensor,
    teacher: tuple[Tensor, Tensor],
    masks: Masks,
    temperature: float,
    *,
    frozen: bool,
    fused: bool,
) -> tuple[Tensor, Tensor]:
    """(DINO's loss of all views, the loss of masked patches).

    pooled [V*B, D] and tokens [G*B*T, D]: see `student_features`. teacher: probabilities [G, B, K] of the global views, and
    [M, K'] of the masked patches. frozen, fused: see `views_loss`.
    """
    q_cls, q_patch = teacher
    cls = views_loss(heads.cls, pooled, q_cls, temperature, frozen=frozen, fused=fused)
    logits = heads.of_patches(tokens[masks.index], frozen)  # [M, K']
    return cls, patch_loss(logits, q_patch, masks.weights, len(masks.counts), temperature)
