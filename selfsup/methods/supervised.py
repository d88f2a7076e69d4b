"""Supervised training: a backbone and a linear head learn the labels of the images.

The recipe every other method is compared with. What is usual is an option or a section of its own: mixed images with mixed
labels (`mix`), label smoothing (Szegedy et al., 2016, section 7), sigmoid loss (Beyer et al., 2020; Wightman et al., 2021),
dropout before the head, averaged weights (`ema`). He et al., 2019 ("Bag of Tricks") and Touvron et al., 2021 (DeiT) name
the values; see the recipes `resnet50_tricks` and `deit_small`.

With `consistency` it is the mean teacher (Tarvainen & Valpola, 2017): of two views of an image the student sees one, its
own average another, and beside the labels the student learns what its average says. Mixed images are mixed alike in all views.
"""

import copy
import math
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from selfsup import dist
from selfsup.backbones import Backbone, create_backbone
from selfsup.backbones.stochastic import key_stochastic_layers
from selfsup.classifier import Activation, Classifier
from selfsup.config import Config, Duration, Probability, Section
from selfsup.data.mixing import Mixer
from selfsup.data.views import View, multicrop
from selfsup.ema import ema_update
from selfsup.errors import UserError
from selfsup.losses.classification import Smoothing, binary_cross_entropy, one_hot, smooth, soft_cross_entropy
from selfsup.losses.numerics import at_least_float32
from selfsup.methods.contract import Labels, ViewBatch
from selfsup.methods.network import drawing, has_batch_statistics, momentum_copy
from selfsup.schedules import Plan, Schedule, averaging


class SupervisedOptions(Section):
    """Options of supervised training; by default there is softmax cross-entropy and nothing else."""

    loss: Activation = "softmax"
    """softmax: cross-entropy with one distribution over the classes; sigmoid: a yes or no for each class."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Weight epsilon that the label gives up to the other classes."""
    smoothing_form: Smoothing = "all"
    """all: epsilon / K to each of the K classes, the label's included (Szegedy et al., 2016; torch);
    others: epsilon / (K - 1) to each but the label's own (He et al., 2019, section 5.2)."""
    sum_classes: bool = False
    """The sigmoid loss as a sum over the classes, K times as large (Beyer et al., 2020), not their mean (as in timm)."""
    target_threshold: Probability | None = None
    """The sigmoid loss takes targets above this for 1, others for 0 (Wightman et al., 2021: 0.2, with mixed images)."""
    head_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    head_bias_init: float = 0.0
    """Of every class. With the sigmoid loss about -log(classes), so that training begins at a small loss."""
    ema: Probability | None = None
    """Momentum of the averaged weights, which are evaluated and exported; null: there are none."""
    consistency: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the mean teacher's loss, in the end; needs `ema` and views.global.count=2 or more."""
    consistency_loss: Literal["mse", "kl"] = "mse"
    """Between probabilities: their squared distance, a mean over the classes; or KL(teacher || student)."""
    consistency_warmup: Duration = "20%"
    """The weight grows as exp(-5 (1 - t)^2), t from 0 to 1 over this time (Laine & Aila, 2017)."""


class Supervised(nn.Module):
    """`student`: backbone and head; `teacher`: their average, if `ema` asks for one."""

    Options = SupervisedOptions
    labels: ClassVar[Labels] = "needed"

    def __init__(self, config: Config, options: SupervisedOptions) -> None:
        super().__init__()
        self.options = options
        self._views = [view for view in multicrop(config.views) if view.kind == "global"]  # local ones are not made
        _check(config, options)
        classes = config.data.classes or 0
        backbone = create_backbone(
            config.backbone, mean=config.mean, std=config.std, input_size=config.views.global_.size
        )
        backbone.check_size(config.views.global_.size)
        backbone.shortcuts = frozenset(config.shortcuts)
        self.classes = classes
        self.mixer = Mixer(config.mix, config.seed, config.global_batch)
        self.mixer.check(config.global_batch // (config.accumulate * dist.world()))
        head = nn.Linear(backbone.embed_dim, classes)
        nn.init.trunc_normal_(head.weight, std=0.02)
        nn.init.constant_(head.bias, options.head_bias_init)
        self.student = Classifier(backbone, head, options.head_dropout, options.loss)
        self.teacher: Classifier | None = None
        if options.ema is not None:
            self.teacher = momentum_copy(self.student)
        self.random = key_stochastic_layers(self.student, config.seed)
        self.batch_statistics = has_batch_statistics(self.student)

    def views(self) -> list[View]:
        """The global views; each is classified."""
        return self._views

    def schedules(self, plan: Plan) -> dict[str, Schedule]:
        """Whether images are mixed, momentum of the average, weight of the mean teacher's loss: those that are on."""
        out, o = self.mixer.schedules(plan), self.options
        if o.ema is not None:
            out["momentum"] = averaging(o.ema)
        if o.consistency:
            out["consistency"] = ramp_up(o.consistency, plan.steps_of(o.consistency_warmup))
        return out

    def forward(self, batch: ViewBatch, s: Mapping[str, float]) -> dict[str, Tensor]:
        """See `contract.Method.forward`. images: [V, B, C, S, S]."""
        images, keys = batch.images[0], batch.keys(0)  # keys [V*B]
        views, size = images.shape[:2]
        images, targets = self.mixer(images, batch.labels, batch.positions, batch.step, self.encode, s.get("mix", 1.0))
        with drawing(self.random, batch.step, keys):
            (pooled,) = self.student.backbone.embed([images.flatten(0, 1)])  # [V*B, D]
            logits = at_least_float32(self.student.head(self.student.drop(pooled)))  # [V*B, K]
        loss = self.loss(logits, targets.to(logits.dtype).repeat(views, 1))
        hits = logits.detach().argmax(dim=-1) == batch.labels.repeat(views)
        out = {"loss": loss, "batch_top1": hits.float().mean()}
        if self.teacher is not None and self.options.consistency:
            with torch.no_grad():
                taught = at_least_float32(self.teacher(images.flatten(0, 1)))  # [V*B, K]
            student, teacher = (x.unflatten(0, (views, size)) for x in (logits, taught))  # [V, B, K]
            out["consistency_loss"] = consistency(student, teacher, self.options)
            out["loss"] = loss + s["consistency"] * out["consistency_loss"]
        return out

    def encode(self, labels: Tensor) -> Tensor:
        """[B] -> what each label says of the classes, float64 [B, K]: smoothed."""
        return smooth(one_hot(labels, self.classes).double(), self.options.label_smoothing, self.options.smoothing_form)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Both [N, K]; a mean over the images."""
        o = self.options
        if o.loss == "softmax":
            return soft_cross_entropy(logits, targets)
        return binary_cross_entropy(logits, targets, sum_classes=o.sum_classes, threshold=o.target_threshold)

    @torch.no_grad()
    def after_step(self, s: Mapping[str, float], ok: Tensor) -> None:
        """The average moves towards the student."""
        if self.teacher is not None:
            ema_update(self.teacher, self.student, s["momentum"], ok)

    def export(self) -> Backbone:
        """A copy of the backbone in eval mode: the averaged one, if there is one."""
        return copy.deepcopy((self.teacher or self.student).backbone).eval()

    def backbones(self) -> dict[str, Backbone]:
        """The student's, and its average."""
        out = {"student": self.student.backbone}
        return out if self.teacher is None else out | {"teacher": self.teacher.backbone}

    def classifiers(self) -> dict[str, nn.Module]:
        """The average first, if there is one."""
        out: dict[str, nn.Module] = {} if self.teacher is None else {"ema": self.teacher}
        return out | {"head": self.student}


def ramp_up(weight: float, steps: int) -> Schedule:
    """weight * exp(-5 (1 - t)^2), t from 0 to 1 over so many steps, then weight (Laine & Aila, 2017, section 2.1)."""
    return lambda step: weight * math.exp(-5 * (1 - min(1.0, step / max(1, steps))) ** 2)


def consistency(student: Tensor, teacher: Tensor, options: SupervisedOptions) -> Tensor:
    """Distance of the student's answer for each view to the teacher's for the next one; logits [V, B, K] -> scalar.

    Tarvainen & Valpola, 2017, equation 1, with the published code's mean over the classes; views both ways.
    """
    target = teacher.roll(1, dims=0).softmax(dim=-1)  # another view of the same image
    if options.consistency_loss == "mse":
        return (student.softmax(dim=-1) - target).square().mean()
    log_p = student.log_softmax(dim=-1)
    return (torch.special.xlogy(target, target) - target * log_p).sum(dim=-1).mean()


def _check(config: Config, o: SupervisedOptions) -> None:
    """Raise UserError for what does not go together."""
    classes, views = config.data.classes, config.views.global_.count
    if classes is None or classes < 2:
        raise UserError(
            f"data.path={config.data.path}: {classes or 'no'} class to tell apart; method=supervised needs two or more: "
            "give class folders, or a list with labels"
        )
    if views < 1:
        raise UserError(f"views.global.count={views}: method=supervised classifies global views; give 1 or more")
    if o.consistency and (o.ema is None or views < 2):
        raise UserError(
            f"method.consistency={o.consistency:g} with method.ema={o.ema}, views.global.count={views}: the mean teacher needs "
            "averaged weights and two views, as in method.ema=0.999 views.global.count=2"
        )
