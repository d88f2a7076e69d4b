"""BYOT: self-distillation on labels (Zhang et al., 2019, "Be Your Own Teacher: Improve the Performance of Convolutional
Neural Networks via Self Distillation").

Exits after the stages of one network, a bottleneck and a classifier each, learn from the labels, from the distribution of
the deepest exit, and to bring their features near its features. All of it is one forward pass, and every exit can be used
alone: it costs what the stages before it cost.
"""

import copy
from collections.abc import Mapping
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from selfsup import dist
from selfsup.backbones import Backbone, create_backbone
from selfsup.backbones.stages import resolve_layers, stage_layers
from selfsup.backbones.stochastic import key_stochastic_layers
from selfsup.config import Config, Positive, Probability, Section
from selfsup.data.mixing import Mixer
from selfsup.data.views import View, multicrop
from selfsup.errors import UserError
from selfsup.exits import ExitNetwork, Norm, exits_for
from selfsup.losses.byot import byot_loss
from selfsup.losses.classification import Smoothing, one_hot, smooth
from selfsup.methods.contract import Labels, ViewBatch
from selfsup.methods.network import drawing, has_batch_statistics
from selfsup.schedules import Plan, Schedule

NonNegative = Annotated[float, Field(ge=0)]


class BYOTOptions(Section):
    """Options of BYOT. Their authors give no values; defaults are those of a public reimplementation for CIFAR-100
    (luanyunteng/pytorch-be-your-own-teacher: alpha 0.1, temperature 3, 1e-6 of the features' sum over 128 images)."""

    exits: tuple[int, ...] | None = None
    """Layers (stages of a pyramid, blocks of a ViT) after which there is an exit, beside the deepest one. Default: every
    stage; for nets of one resolution after a quarter, a half and three quarters of the blocks."""
    width: Positive | None = None
    """Channels inside the bottlenecks; default: a quarter of the deepest feature's."""
    norm: Norm | None = None
    """In the bottlenecks; default: batch where the backbone has batch norm, as in the paper, else layer."""
    alpha: Probability = 0.1
    """Of what a shallow exit learns, the part that comes from the deepest exit's distribution; the rest is labels."""
    temperature: Annotated[float, Field(gt=0)] = 3.0
    feature_weight: NonNegative = 1e-4
    """lambda, of the squared distance between features (of an image, over all dimensions)."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Weight epsilon that the label gives up to the other classes."""
    smoothing_form: Smoothing = "all"
    """all: epsilon / K to each of the K classes, the label's included; others: epsilon / (K - 1) to each but the label's."""


class BYOT(nn.Module):
    """One network with several exits."""

    Options = BYOTOptions
    labels: ClassVar[Labels] = "needed"

    def __init__(self, config: Config, options: BYOTOptions) -> None:
        super().__init__()
        self.options = options
        self._views = [view for view in multicrop(config.views) if view.kind == "global"]  # local ones are not made
        classes = _classes(config)
        size = config.views.global_.size
        backbone = create_backbone(config.backbone, mean=config.mean, std=config.std, input_size=size)
        backbone.check_size(size)
        head = nn.Linear(backbone.embed_dim, classes)
        layers = _exit_layers(backbone, options)
        exits = exits_for(backbone, layers, classes, options.width, options.norm)
        self.classes = classes
        self.mixer = Mixer(config.mix, config.seed, config.global_batch)
        self.mixer.check(config.global_batch // (config.accumulate * dist.world()))
        self.student = ExitNetwork(backbone, head, exits, layers)
        self.random = key_stochastic_layers(self.student, config.seed)
        self.batch_statistics = has_batch_statistics(self.student)

    @staticmethod
    def suits(backbone: Backbone) -> None:
        """Raise UserError for one that has no stages for exits of their own."""
        _exit_layers(backbone, BYOTOptions())

    def views(self) -> list[View]:
        """Global crops alone."""
        return self._views

    def schedules(self, plan: Plan) -> dict[str, Schedule]:
        """Whether images are mixed, if they are."""
        return self.mixer.schedules(plan)

    def forward(self, batch: ViewBatch, s: Mapping[str, float]) -> dict[str, Tensor]:
        """See `contract.Method.forward`. images: global [V, B, C, S, S]."""
        images, keys, o = batch.images[0], batch.keys(0), self.options  # keys [V*B]
        views = images.shape[0]
        images, targets = self.mixer(images, batch.labels, batch.positions, batch.step, self.encode, s.get("mix", 1.0))
        with drawing(self.random, batch.step, keys):
            features, logits = self.student(images.flatten(0, 1))  # an exit: [V*B, D], [V*B, K]
        targets = targets.to(torch.promote_types(logits[-1].dtype, torch.float32)).repeat(views, 1)  # [V*B, K]
        weights = {"alpha": o.alpha, "temperature": o.temperature, "feature_weight": o.feature_weight}
        parts = byot_loss(logits, features, targets, **weights)
        labels = batch.labels.repeat(views)  # [V*B]
        with torch.no_grad():
            right = [(z.argmax(dim=-1) == labels).float().mean() for z in logits]
        out = {"loss": parts.pop("loss"), "batch_top1": right.pop()}
        out |= {f"batch_top1_exit{i + 1}": value for i, value in enumerate(right)}
        return out | {f"{name}_loss": value.detach() for name, value in parts.items()}

    def encode(self, labels: Tensor) -> Tensor:
        """[B] -> what each label says of the classes, float64 [B, K]: smoothed."""
        return smooth(one_hot(labels, self.classes).double(), self.options.label_smoothing, self.options.smoothing_form)

    def after_step(self, s: Mapping[str, float], ok: Tensor) -> None:
        """Nothing moves but by the optimizer."""

    def export(self) -> Backbone:
        """A copy of the backbone in eval mode."""
        return copy.deepcopy(self.student.backbone).eval()

    def backbones(self) -> dict[str, Backbone]:
        """The one there is."""
        return {"student": self.student.backbone}

    def classifiers(self) -> dict[str, nn.Module]:
        """'exit4' (the deepest), 'exit1', 'exit2', 'exit3', 'ensemble'."""
        return self.student.classifiers()


def _classes(config: Config) -> int:
    """How many there are. Raises UserError for what does not go together."""
    classes, views = config.data.classes, config.views.global_.count
    if classes is None or classes < 2:
        raise UserError(
            f"data.path={config.data.path}: {classes or 'no'} class to tell apart; method=byot learns from labels and needs two "
            "or more: give class folders, or a list with labels"
        )
    if views < 1:
        raise UserError(f"views.global.count={views}: method=byot classifies global views; give 1 or more")
    if config.compile:
        raise UserError("compile=true: method=byot reads the maps between the stages, uncompiled; use compile=false")
    return classes


def _exit_layers(backbone: Backbone, options: BYOTOptions) -> list[int]:
    """The layers of `method.exits`, ascending. Raises UserError for those that do not exist, and for the last."""
    if options.exits is None:
        found = stage_layers(backbone)
        if not found:
            raise UserError(
                f"method=byot: {backbone.name} has one stage only; choose method.exits, or another backbone"
            )
        return found
    found = sorted(set(resolve_layers(backbone, options.exits, "method.exits")))
    last = resolve_layers(backbone, [-1])[0]
    if not found or last in found:
        raise UserError(
            f"method.exits={list(options.exits)}: after layer {last}, the last, is the deepest exit, which is always there; "
            f"give layers from 0 to {last - 1}"
        )
    return found
