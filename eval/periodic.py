"""k-NN during training: a callable that the command line hands to the trainer."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from selfsup import config as configuration
from selfsup import dist
from selfsup.backbones import Backbone
from selfsup.config import Config

from .datasets import LabelledPair, labelled_only, open_pair
from .features import FeatureFile, extract, transform_for
from .knn import classify
from .poolings import Request
from .settings import KnnSettings
from .targets import Target, weights_hash

_QUIET = 5_000  # evaluations with fewer images than this show no progress


@dataclass(frozen=True)
class Periodic:
    """An evaluation that the trainer calls, and that tells beforehand what its figures are called."""

    evaluate: Callable[[Any, int], dict[str, float]]
    figures: Any
    """Names; of what has several subjects, a function from their names to them."""

    def __call__(self, subject: Any, step: int) -> dict[str, float]:
        return self.evaluate(subject, step)


def knn_callable(config: Config, run: Path) -> Periodic:
    """evaluate(backbone, step) -> {"knn_top1": ...} on `eval.train`/`eval.val` (else the run's data, split as in `open_pair`).

    The first k gives "knn_top1", further ones "knn_top1_k200". Every rank calls it and gets the same figures. It draws
    nothing from global generators, restores thread counts, and leaves the backbone's mode as it was. Data is opened, and
    refused if it has no labels, now: before the first step and not at the first evaluation. Raises UserError.
    """
    values = {"k": list(config.eval.k), "temperature": config.eval.temperature, "max_train": config.eval.max_train}
    values |= {"workers": config.workers, "seed": config.seed, "cache": False}
    settings = configuration.validate(KnnSettings, values, where="eval")
    blank = Target(str(run), "run", None, "", torch.device("cpu"), None, config)
    pair: list[LabelledPair] = []
    if config.eval.every is not None:
        pair.append(labelled_only(open_pair(blank, settings, channels=config.backbone.in_chans))[0])

    def evaluate(backbone: Backbone, step: int) -> dict[str, float]:
        if not pair:
            pair.append(labelled_only(open_pair(blank, settings, channels=config.backbone.in_chans))[0])
        return _knn(backbone, step, pair[0], settings, config, run)

    return Periodic(evaluate, _names(settings))


def _names(settings: KnnSettings) -> list[str]:
    return ["knn_top1", *(f"knn_top1_k{k}" for k in settings.k[1:])]


def _knn(
    backbone: Backbone, step: int, pair: LabelledPair, settings: KnnSettings, config: Config, run: Path
) -> dict[str, float]:
    modes = {module: module.training for module in backbone.modules()}
    threads = torch.get_num_threads()
    device = next(backbone.parameters()).device
    target = Target(str(run), "run", backbone, weights_hash(backbone.model), device, None, config, step)
    request = Request("pooled")
    backbone.eval()
    try:
        transform = transform_for(target, pair.train, settings)
        scratch = run / "eval"
        files: list[FeatureFile] = [
            extract(
                target, images, settings, [request], transform, what=what, scratch=scratch, quiet=len(images) < _QUIET
            )
            for what, images in (("k-NN: train", pair.train), ("k-NN: val", pair.val))
        ]
        top1 = torch.zeros(len(settings.k), dtype=torch.float64)
        if dist.is_main():
            known = [f.readable(request) for f in files]
            rows, _ = classify(
                files[0].array(request), np.where(known[0], pair.train_labels, -1),
                files[1].array(request), np.where(known[1], pair.val_labels, -1),
                ks=settings.k, temperatures=settings.temperature, classes=pair.classes, device=device,
            )  # fmt: skip
            top1 = torch.tensor([row["top1"] for row in rows], dtype=torch.float64)
        dist.barrier()  # the others wait here, where it may take long
        share = top1.to(device)
        figures = dist.all_reduce_(share).tolist()  # the other ranks added 0
    finally:
        torch.set_num_threads(threads)
        for module, mode in modes.items():
            module.training = mode
    return dict(zip(_names(settings), figures))
