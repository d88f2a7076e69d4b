"""Accuracy on val images during training: a callable that the command line hands to the trainer."""

from pathlib import Path

import torch
from torch import nn

from selfsup import config as configuration
from selfsup.config import Config
from selfsup.data.sources import open_source

from .class_figures import figures
from .class_names import open_val, val_of
from .classify import Subject, answers, transform_of
from .periodic import Periodic
from .settings import ClassifySettings
from .targets import Target

_QUIET = 5_000  # evaluations with fewer images than this show no progress


def classify_callable(config: Config, run: Path) -> Periodic | None:
    """classify(classifiers, step) -> {"top1": of the main one, "top1_NAME": of each other}, on `eval.val` or `data.val`.

    None without a val set: what a run trains on says nothing about how it does. Every rank calls it and gets the same. It
    draws nothing from global generators, and leaves modules and threads as they were. Val images are opened, and refused
    for classes that the training images do not have, now, if the training images have labels; else at the first call.
    """
    if val_of(config) is None:
        return None
    values = {"workers": config.workers, "seed": config.seed}
    settings = configuration.validate(ClassifySettings, values, where="eval")
    blank = Target(str(run), "run", None, "", torch.device("cpu"), None, config)
    opened = []
    if classes := config.data.classes or _counted(config):
        opened.append(open_val(blank, settings, classes, None, config.backbone.in_chans))

    def classify(classifiers: dict[str, nn.Module], step: int) -> dict[str, float]:
        like = next(iter(next(iter(classifiers.values())).parameters()))
        if not opened:
            opened.append(
                open_val(blank, settings, _classes(classifiers, config, like), None, config.backbone.in_chans)
            )
        val = opened[0]
        subject = Subject(
            blank, classifiers, val.classes, val.class_names, config.views.global_.size, config.mean, config.std
        )
        modes = {m: m.training for c in classifiers.values() for m in c.modules()}
        threads = torch.get_num_threads()
        try:
            for module in classifiers.values():
                module.eval()
            found = answers(
                classifiers, val, transform_of(subject, settings), settings, like.device,
                what="top-1: val", quiet=len(val.images) < _QUIET,
            )  # fmt: skip
        finally:
            torch.set_num_threads(threads)
            for module, mode in modes.items():
                module.training = mode
        top1 = {name: figures(a, val.labels, val.classes)["top1"] for name, a in found.items()}
        return dict(zip(_names(list(top1)), top1.values()))

    return Periodic(classify, _names)


def _names(classifiers: list[str]) -> list[str]:
    return ["top1", *(f"top1_{name}" for name in classifiers[1:])]


def _counted(config: Config) -> int:
    """Classes of the training images; 0 if they have no labels."""
    labels = open_source(config.data.path, channels=config.backbone.in_chans, config=config.data).labels
    return 0 if labels is None else int(labels.max()) + 1


def _classes(classifiers: dict[str, nn.Module], config: Config, like: torch.Tensor) -> int:
    """How many classes the logits are for, from a blank image."""
    module, size = next(iter(classifiers.values())), config.views.global_.size
    mode = {m: m.training for m in module.modules()}
    with torch.no_grad():
        blank = torch.zeros(1, config.backbone.in_chans, size, size, device=like.device, dtype=like.dtype)
        found = module.eval()(blank).shape[1]
    for m, training in mode.items():
        m.training = training
    return int(found)
