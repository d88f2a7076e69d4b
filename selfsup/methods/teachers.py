"""Frozen teachers: any network with trained weights, asked for logits, features or maps of the student's own views.

A teacher is no part of the method's module tree: it is in no checkpoint, no optimizer and no moving average, stays in
eval mode, and is opened again from `teacher.path` on a resume. Its weights are told by a sha256 that the method keeps.
`teacher_sources.open_teacher` makes one.

It sees what the student sees: the student's view, back in [0, 1], with its own number of channels (grey is repeated;
colour becomes luma, 0.299 R + 0.587 G + 0.114 B), at its own size (bicubic, antialiased; the same geometry), normalised
with its own mean and standard deviation.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfsup import dist
from selfsup.backbones import Backbone, Features
from selfsup.errors import UserError
from selfsup.methods.outputs import Layer, Outputs, Wanted, features_and_maps, resolve_layers
from selfsup.wording import one_line

LUMA = (0.299, 0.587, 0.114)
"""ITU-R BT.601, as PIL converts colour to grey."""


class FrozenNet(nn.Module):
    """A backbone with whatever it has to tell classes or prototypes."""

    def __init__(
        self,
        backbone: Backbone,
        head: nn.Module | None = None,
        prototypes: nn.Module | None = None,
        center: Tensor | None = None,
    ) -> None:
        """head: pooled [N, D] -> logits; None: timm's own, if the model has kept it. center: of the prototypes, [K]."""
        super().__init__()
        self.backbone, self.head, self.prototypes = backbone, head, prototypes
        self.register_buffer("center", center)
        own = int(getattr(backbone.model, "num_classes", 0) or 0)
        self.classifier = head is None and own > 0
        self.classes = head.out_features if isinstance(head, nn.Linear) else (own or None)
        self.gives = {"pooled", "patches"} | ({"cls"} if backbone._has_cls() else set())
        self.gives |= {"logits"} if self.classes else set()
        self.gives |= {"prototypes"} if prototypes is not None else set()

    def numbers(self, layers: Sequence[Layer], key: str) -> tuple[int, ...]:
        """Of these layers; UserError if there are no such."""
        return tuple(resolve_layers(self.backbone, layers, key))

    def forward(self, images: Tensor, layers: Sequence[int]) -> Outputs:
        """[N, C, H, W], normalised -> all it gives."""
        features, maps, logits = features_and_maps(self.backbone, images, layers, classifier=self.classifier)
        if self.head is not None:
            logits = self.head(features.pooled)
        prototypes = None
        if self.prototypes is not None:
            z = self.prototypes(features.pooled)  # [N, K]
            prototypes = z if self.center is None else z - self.center
        pooled, cls, patches = features.pooled, features.cls, features.patches
        return Outputs(logits=logits, pooled=pooled, cls=cls, patches=patches, prototypes=prototypes, maps=maps)


class ForeignNet(nn.Module):
    """A user's module. It gives logits [N, classes], a map [N, D, h, w], `Features`, or a dict with names of `Outputs`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.classes: int | None = None
        self.gives: set[str] = set()

    def probe(self, images: Tensor) -> None:
        """Learn from blank images what it gives."""
        try:
            found = self(images, ()).named()
        except UserError:
            raise
        except Exception as error:
            shape, kind = tuple(images.shape), type(self.module).__name__
            raise UserError(
                f"teacher={kind}: fails on images {shape}: {one_line(error, 200)}; see teacher.size"
            ) from None
        self.gives = set(found)
        self.classes = found["logits"].shape[1] if "logits" in found else None

    def numbers(self, layers: Sequence[Layer], key: str) -> tuple[int, ...]:
        """It has none."""
        raise UserError(f"{key}: {type(self.module).__name__} gives no intermediate layers; a timm model or a run does")

    def forward(self, images: Tensor, layers: Sequence[int]) -> Outputs:
        """[N, C, H, W], normalised -> all it gives."""
        out = self.module(images)
        if isinstance(out, Features):
            return Outputs(pooled=out.pooled, cls=out.cls, patches=out.patches)
        if isinstance(out, Tensor) and out.ndim == 2:
            return Outputs(logits=out)
        if isinstance(out, Tensor) and out.ndim == 4:
            return Outputs(pooled=out.mean(dim=(2, 3)), patches=out)  # [N, D, h, w] -> [N, D]
        known = ("logits", "pooled", "cls", "patches", "prototypes")
        if isinstance(out, Mapping) and out and set(out) <= set(known):
            return Outputs(**out)
        raise UserError(
            f"teacher={type(self.module).__name__}: gives a {type(out).__name__}; logits [N, classes], a map [N, D, h, w], "
            f"Features, or a dict with some of {', '.join(known)} is needed"
        )


class Teacher:
    """A frozen network and how it wants its images. No nn.Module, so that a method does not register it."""

    def __init__(
        self,
        name: str,
        net: FrozenNet | ForeignNet,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        size: tuple[int, int] | None,
        student_mean: Sequence[float],
        student_std: Sequence[float],
        view_size: int,
        temperature: float | None = None,
    ) -> None:
        """mean, std, size: the teacher's (None: that of the view, `view_size`). temperature: of its prototypes."""
        self.name, self.net = name, net.eval().requires_grad_(False)
        self.mean, self.std = tuple(map(float, mean)), tuple(map(float, std))
        self.size, self.temperature = size, temperature
        self.sha256 = weights_sha256(net)
        channels, ours = len(self.mean), len(student_mean)
        if channels != ours and {channels, ours} != {1, 3}:
            raise UserError(
                f"teacher={name}: takes images of {channels} channels, the student's have {ours}; only grey and colour "
                "are converted into one another"
            )
        self.same_values = self.mean == tuple(student_mean) and self.std == tuple(student_std)
        self._values = {"mean": self.mean, "std": self.std, "s_mean": student_mean, "s_std": student_std, "luma": LUMA}
        self._constants = _constants(self._values, torch.zeros(()))
        if isinstance(net, ForeignNet):
            like = next(net.parameters(), torch.zeros(()))
            h, w = size or (view_size, view_size)
            with torch.no_grad():
                net.probe(torch.zeros(1, channels, h, w, device=like.device, dtype=like.dtype))

    @property
    def classes(self) -> int | None:
        """Of its logits; None if it gives none."""
        return self.net.classes

    @property
    def gives(self) -> set[str]:
        """Names of `Outputs` that it has."""
        return self.net.gives

    def move(self, function: Callable[[Tensor], Tensor]) -> None:
        """What `nn.Module._apply` does for the module that uses it: to a device, a dtype, a memory format."""
        self.net._apply(function)
        self._constants = _constants(self._values, function(self._constants["mean"]))

    def prepare(self, images: Tensor) -> Tensor:
        """The student's normalised images [N, C, H, W] -> the teacher's [N, C', H', W']."""
        c = self._constants
        if not self.same_values:
            images = images * c["s_std"] + c["s_mean"]  # [0, 1]
            if images.shape[1] < len(self.mean):
                images = images.expand(-1, len(self.mean), -1, -1)
            elif images.shape[1] > len(self.mean):
                images = (images * c["luma"]).sum(1, keepdim=True)
        if self.size is not None and images.shape[-2:] != self.size:
            images = F.interpolate(images, size=self.size, mode="bicubic", antialias=True, align_corners=False)
        return images if self.same_values else (images - c["mean"]) / c["std"]

    @torch.no_grad()
    def __call__(self, images: Tensor, wanted: Wanted) -> Outputs:
        """Of the student's images [N, C, H, W], what is wanted of what it gives."""
        out = self.net(self.prepare(images), tuple(int(i) for i in wanted.layers))
        return Outputs(**{name: getattr(out, name) for name in wanted.names}, maps=out.maps)

    def check(self, wanted: Wanted, why: Mapping[str, str]) -> None:
        """Raise UserError if it does not give all that is wanted; why: name of an output -> the option that needs it."""
        for name in wanted.names:
            if name not in self.gives:
                raise UserError(
                    f"teacher={self.name}: gives no {_WORDS[name]}, which {why[name]} needs; {_ADVICE[name]}"
                )


def _constants(values: Mapping[str, Sequence[float]], like: Tensor) -> dict[str, Tensor]:
    """[C, 1, 1] each, on the device already when they are needed."""
    made = {key: torch.tensor(list(v), dtype=like.dtype, device=like.device) for key, v in values.items()}
    return {key: value[:, None, None] for key, value in made.items()}


_WORDS = {
    "logits": "logits",
    "pooled": "pooled features",
    "cls": "CLS token",
    "patches": "map",
    "prototypes": "prototypes",
}
_ADVICE = {
    "logits": "give a classifier (a supervised run, a timm name), or losses between features",
    "pooled": "give a run, a folder or a timm name, or a module that returns Features",
    "cls": "take a ViT with a CLS token, or another loss",
    "patches": "give a run, a folder or a timm name, or a module that returns Features",
    "prototypes": "give a run of method=dino with its checkpoints",
}


def weights_sha256(module: nn.Module) -> bytes:
    """sha256 (32 bytes) over names, types, shapes and values of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        plain = value.detach().cpu().contiguous().reshape(-1)
        digest.update(plain.view(torch.uint8).numpy())
    return digest.digest()


def keep_sha256(method: nn.Module, teacher: Teacher) -> None:
    """Keep the teacher's sha256 in the method's state as `teacher_sha256`, and refuse a state with another."""
    method.register_buffer("teacher_sha256", torch.tensor(list(teacher.sha256), dtype=torch.uint8))

    def compare(module: nn.Module, state: Mapping[str, Any], prefix: str, *_: Any) -> None:
        stored = state.get(f"{prefix}teacher_sha256")
        if stored is not None and bytes(stored.cpu().tolist()) != teacher.sha256:
            was = bytes(stored.cpu().tolist()).hex()[:12]
            raise UserError(
                f"teacher={teacher.name}: its weights (sha256 {teacher.sha256.hex()[:12]}...) are not those that this run "
                f"learns from ({was}...); give the teacher it began with, or start a new run with --out"
            )

    method.register_load_state_dict_pre_hook(compare)


def check_ranks(method: nn.Module, teacher: Teacher) -> None:
    """Raise UserError, on every rank, if they do not all have the same teacher."""
    if dist.world() == 1:
        return
    own: Any = method.teacher_sha256
    everyones = dist.all_gather(own[None])  # [ranks, 32]
    if not bool((everyones == everyones[:1]).all()):
        raise UserError(f"teacher={teacher.name}: ranks have different ones under this name; give all the same files")
