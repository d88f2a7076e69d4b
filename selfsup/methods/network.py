"""What methods that compare views have in common: a backbone with a head on it, its moving average, and its embeddings."""

import contextlib
import copy
import itertools
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfsup import dist
from selfsup.backbones import Backbone, create_backbone
from selfsup.backbones.stochastic import StochasticKeys, strip_stochastic_layers
from selfsup.config import Config
from selfsup.data.views import View, multicrop
from selfsup.errors import UserError
from selfsup.losses.numerics import at_least_float32
from selfsup.methods.contract import ViewBatch

M = TypeVar("M", bound=nn.Module)


class Network(nn.Module):
    """Backbone and head: `student` and `teacher` of every such method, so that checkpoints read alike."""

    def __init__(self, backbone: Backbone, head: Any) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head


def check_views(config: Config, method: str) -> None:
    """Raise UserError unless there are a global view and another one; `method` says who compares them."""
    global_views, local_views = config.views.global_.count, config.views.local.count
    if global_views < 1 or global_views + local_views < 2:
        raise UserError(
            f"views.global.count={global_views}, views.local.count={local_views}: {method} compares "
            "different views; give at least one global view and two in all"
        )


def compared_views(config: Config) -> list[View]:
    """The views of a configuration, for a method that compares those of an image. Raises UserError if there are too few.

    What a view learns from are global views alone, as Caron et al., 2020 (SwAV, section 3.3) have it: local ones follow.
    """
    check_views(config, f"method={config.method.name}")
    if config.global_batch < 2:
        raise UserError(
            f"global_batch={config.global_batch}: method={config.method.name} normalises over the images of a step; "
            "give 2 or more"
        )
    return multicrop(config.views)


def build_backbone(config: Config) -> Backbone:
    """The backbone of a configuration. Raises UserError if it does not take the views' sizes."""
    backbone = create_backbone(config.backbone, mean=config.mean, std=config.std, input_size=config.views.global_.size)
    for crops in (config.views.global_, config.views.local):
        if crops.count:
            backbone.check_size(crops.shape)
    backbone.shortcuts = frozenset(config.shortcuts)
    return backbone


def momentum_copy(student: M) -> M:
    """A copy to be moved by `ema_update`: the same weights, no gradients, and nothing is dropped in it.

    Make it before the student's stochastic layers are keyed.
    """
    teacher = copy.deepcopy(student)
    strip_stochastic_layers(teacher)
    return teacher.requires_grad_(False)


def has_batch_statistics(*modules: nn.Module) -> bool:
    """Whether there is a batch norm in any."""
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for module in modules for m in module.modules())


def drawing(random: StochasticKeys | None, step: int, keys: Any) -> contextlib.AbstractContextManager[None]:
    """The context in which stochastic layers run; None: there are none."""
    return contextlib.nullcontext() if random is None else random.at(step, keys)


def embed_views(
    backbone: Backbone,
    batch: ViewBatch,
    random: StochasticKeys | None,
    kinds: int | None = None,
    apart: bool = False,
) -> Tensor:
    """Pooled features of every view, [views * B, D], views first; of the first so many kinds of views alone, if given.

    random: of the backbone's stochastic layers; each view of an image draws for itself. apart: batch norm sees one view at a
    time, instead of all of one kind.
    """
    kept = batch.images[:kinds]
    seen = [0, *itertools.accumulate(x.shape[0] for x in kept)]
    images = [x.flatten(0, 1) for x in kept]  # [V, B, C, S, S] -> [V*B, C, S, S]
    keys = [batch.keys(kind, seen[kind]) for kind in range(len(kept))]  # [V*B]
    if apart:
        size = batch.positions.shape[0]
        images, keys = (
            [part for x in tensors for part in x.split(size)] for tensors in (images, keys)
        )  # V times [B, ...]
    return torch.cat(backbone.embed(images, keys, lambda keys: drawing(random, batch.step, keys)))


def each_view(head: nn.Module, features: Tensor, views: int) -> Tensor:
    """A head on one view after another, so that its batch norm sees one at a time: [views * B, D] -> [views, B, K]."""
    return torch.stack([head(view) for view in features.chunk(views)])


def gather_images(z: Tensor) -> Tensor:
    """Every rank's images, with gradient (`dist.all_gather_with_grad`): [V, B, K] -> [V, world * B, K]."""
    return dist.all_gather_with_grad(z.transpose(0, 1)).transpose(0, 1)


@torch.no_grad()
def spread(features: Tensor) -> Tensor:
    """Standard deviation of normalised features [N, D] times sqrt(D), a mean over D: 1 on the whole sphere, 0 if constant."""
    unit = F.normalize(at_least_float32(features), dim=-1)
    return unit.std(dim=0).mean() * unit.shape[1] ** 0.5
