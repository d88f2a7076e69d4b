"""DeiT: distillation through a token (Touvron et al., 2021, "Training data-efficient image transformers & distillation
through attention", section 4).

A distillation token stands beside CLS. Of two linear heads the one on CLS learns the labels, the one on the distillation
token what a frozen teacher says: its decision (hard, equation 3) or its distribution (soft, equation 2). At test time both
heads' logits are averaged; the exported model is timm's `*_distilled`.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from selfsup.backbones import Backbone, create_backbone
from selfsup.backbones.stochastic import key_stochastic_layers
from selfsup.config import Config, Probability, Section
from selfsup.data.base import Source
from selfsup.data.mixing import Mixer
from selfsup.data.views import View, multicrop
from selfsup.ema import ema_update
from selfsup.errors import UserError
from selfsup.losses.classification import one_hot, smooth, soft_cross_entropy
from selfsup.losses.numerics import at_least_float32
from selfsup.methods.contract import Labels, ViewBatch
from selfsup.methods.distill_terms import hard_term, soft_term
from selfsup.methods.network import drawing, has_batch_statistics, momentum_copy
from selfsup.methods.outputs import Wanted
from selfsup.methods.teacher_cache import TeacherCache, ask, open_cache
from selfsup.methods.teacher_sources import open_teacher
from selfsup.methods.teachers import check_ranks, keep_sha256
from selfsup.schedules import Plan, Schedule, averaging


class DeiTOptions(Section):
    """Options of DeiT; defaults are the paper's."""

    distillation: Literal["hard", "soft"] = "hard"
    alpha: Probability = 0.5
    """Weight of the teacher's part; the labels' is 1 - alpha. Half and half for hard, the paper's lambda for soft (0.1)."""
    temperature: Annotated[float, Field(gt=0)] = 3.0
    """Of soft distillation: the paper's tau."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Of the labels: eps / K to each of the K classes."""
    ema: Probability | None = None
    """Momentum of averaged weights, which are evaluated and exported; null: there are none."""


class DistilledNet(nn.Module):
    """A ViT with two tokens and a head on each: timm's `VisionTransformerDistilled` as it is evaluated."""

    def __init__(self, backbone: Backbone, classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.embed_dim, classes)
        self.head_dist = nn.Linear(backbone.embed_dim, classes)
        for head in (self.head, self.head_dist):
            nn.init.trunc_normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)

    def both(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """[B, C, H, W], normalised -> logits of CLS and of the distillation token, [B, classes] each."""
        tokens = self.backbone._run("forward_features", images)  # [B, 2 + h*w, D]
        return self.head(tokens[:, 0]), self.head_dist(tokens[:, 1])

    def forward(self, images: Tensor) -> Tensor:
        """Their mean, as timm's model gives it in eval mode."""
        cls, distilled = self.both(images)
        return (cls + distilled) / 2


class OneHead(nn.Module):
    """One of the two heads alone."""

    def __init__(self, net: DistilledNet, which: int) -> None:
        super().__init__()
        self.net, self.which = net, which

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> logits [B, classes]."""
        return self.net.both(images)[self.which]


class DeiT(nn.Module):
    """`student`: backbone, `head` and `head_dist`; `teacher`: its average, if `ema` asks for one."""

    Options = DeiTOptions
    labels: ClassVar[Labels] = "needed"
    takes_teacher: ClassVar[bool] = True

    def __init__(self, config: Config, options: DeiTOptions, teacher: nn.Module | None = None) -> None:
        super().__init__()
        self.options, self.config = options, config
        self._views = [view for view in multicrop(config.views) if view.kind == "global"]
        if not self._views:
            raise UserError("views.global.count=0: method=deit classifies global views; give 1 or more")
        self.classes = config.data.classes or 0
        self.frozen = open_teacher(config, teacher)
        self.wanted = Wanted(logits=True)
        self.frozen.check(self.wanted, {"logits": "method=deit"})
        if self.frozen.classes != self.classes:
            raise UserError(
                f"teacher={self.frozen.name} tells {self.frozen.classes} classes, the data have {self.classes}; "
                "method=deit needs the same"
            )
        if config.mix.name != "none" and config.teacher.cache is not None:
            raise UserError(
                f"mix={config.mix.name} with teacher.cache={config.teacher.cache}: a cache holds what the teacher says of single "
                "images; leave one of them out"
            )
        size = config.views.global_.size
        backbone = create_backbone(config.backbone, mean=config.mean, std=config.std, input_size=size)
        self.suits(backbone)
        backbone.check_size(size)
        self.student = DistilledNet(backbone, self.classes)
        self.teacher: DistilledNet | None = None
        if options.ema is not None:
            self.teacher = momentum_copy(self.student)
        self.random = key_stochastic_layers(self.student, config.seed)
        self.batch_statistics = has_batch_statistics(self.student)
        self.mixer = Mixer(config.mix, config.seed, config.global_batch)
        self.cache: TeacherCache | None = None
        keep_sha256(self, self.frozen)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DeiT":
        self.frozen.move(fn)  # it is no module of ours, and goes where we go
        return super()._apply(fn, recurse)

    def bind(self, source: Source, views: Sequence[View]) -> None:
        """The data are known: open the cache."""
        check_ranks(self, self.frozen)
        self.cache = open_cache(self.config, self.frozen, self.wanted, source, views, self.options.temperature)

    @staticmethod
    def suits(backbone: Backbone) -> None:
        """Raise UserError for one without a distillation token."""
        if not hasattr(backbone.model, "dist_token"):
            raise UserError(
                f"backbone.name={backbone.name}: has no distillation token; method=deit needs one of timm's *_distilled, as in "
                "backbone=deit_tiny_distilled_patch16_224"
            )

    def views(self) -> list[View]:
        """The global views; student and teacher see each."""
        return self._views

    def schedules(self, plan: Plan) -> dict[str, Schedule]:
        """Momentum of the average; when mixing stops."""
        out = self.mixer.schedules(plan)
        if (momentum := self.options.ema) is not None:
            out["momentum"] = averaging(momentum)
        return out

    def forward(self, batch: ViewBatch, s: Mapping[str, float]) -> dict[str, Tensor]:
        """See `contract.Method.forward`. images: [V, B, C, S, S]."""
        o, views = self.options, batch.images[0].shape[0]
        mixed, said = self.mixer(
            batch.images[0], batch.labels, batch.positions, batch.step, self._encode, s.get("mix", 1.0)
        )
        images, targets = mixed.flatten(0, 1), said.repeat(views, 1)  # [V*B, C, S, S], [V*B, K]
        taught = ask(self.frozen, self.cache, images, self.wanted, batch)
        with drawing(self.random, batch.step, batch.keys(0)):
            z_cls, z_dist = (at_least_float32(z) for z in self.student.both(images))  # [V*B, K]
        from_labels = soft_cross_entropy(z_cls, targets)
        hard = o.distillation == "hard"
        from_teacher = hard_term(z_dist, taught) if hard else soft_term(z_dist, taught, o.temperature)
        return {
            "loss": (1 - o.alpha) * from_labels + o.alpha * from_teacher,
            "loss/ce": from_labels.detach(),
            f"loss/{o.distillation}": from_teacher.detach(),
        }

    def _encode(self, labels: Tensor) -> Tensor:
        hot = one_hot(labels, self.classes).to(self.student.head.weight.dtype)
        return smooth(hot, self.options.label_smoothing)

    @torch.no_grad()
    def after_step(self, s: Mapping[str, float], ok: Tensor) -> None:
        """The average moves towards the student."""
        if self.teacher is not None:
            ema_update(self.teacher, self.student, s["momentum"], ok)

    def export(self) -> Backbone:
        """A copy of the backbone in eval mode: the averaged one, if there is one."""
        return copy.deepcopy((self.teacher or self.student).backbone).eval()

    def backbones(self) -> dict[str, Backbone]:
        """The student's, and its average; the frozen teacher is not among them."""
        out = {"student": self.student.backbone}
        return out if self.teacher is None else out | {"teacher": self.teacher.backbone}

    def classifiers(self) -> dict[str, nn.Module]:
        """'average' of both heads, 'cls' and 'dist' alone; of the averaged weights, if there are any."""
        return _named(self.teacher or self.student)

    @classmethod
    def classifiers_from(cls, config: Config, state: Mapping[str, Tensor]) -> dict[str, nn.Module]:
        """`classifiers` of a checkpoint, in eval mode; the teacher need not be there any more."""
        prefix = "teacher." if any(key.startswith("teacher.") for key in state) else "student."
        own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        spec = config.backbone.model_copy(update={"pretrained": False})
        backbone = create_backbone(spec, mean=config.mean, std=config.std, input_size=config.views.global_.size)
        net = DistilledNet(backbone, own["head.weight"].shape[0]).eval()
        net.load_state_dict(own)
        return {name: module.eval() for name, module in _named(net).items()}


def _named(net: DistilledNet) -> dict[str, nn.Module]:
    return {"average": net, "cls": OneHead(net, 0), "dist": OneHead(net, 1)}
