"""Linear probe: every learning rate x layer x pooling trained at once, the best chosen on a held-out part of train.

The val images are looked at once, by the chosen head. Features come from centre crops, extracted once and cached; with
`augment=true` they come from random resized crops and flips, with a forward pass in every epoch.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from selfsup import dist
from selfsup.config import Crops
from selfsup.data import photometric
from selfsup.data.loader import Loader
from selfsup.data.split import split
from selfsup.data.views import View
from selfsup.errors import UserError

from . import results
from .datasets import Labelled, LabelledPair, labelled_only, open_pair
from .features import FeatureFile, Transform, extract, transform_for
from .poolings import Request, check_requests, forward_function
from .probe import Cached, Probe, Recipe, statistics, steps_of, train_cached
from .progress import Progress
from .settings import LinearSettings, resolve
from .targets import Target, open_target

_AUGMENTATION = Crops(
    count=1, scale=(0.08, 1.0), interpolation="bilinear", hflip=0.5, jitter=0.0, grayscale=0.0, blur=0.0, solarize=0.0
)
"""torchvision's RandomResizedCrop and RandomHorizontalFlip with their defaults, as in DINO's eval_linear."""


@dataclass(frozen=True)
class Head:
    """One point of the grid."""

    request: Request
    lr: float


def run(target: str, overrides: list[str], out: Path | None = None) -> dict[str, Any]:
    """`selfsup eval linear TARGET`: print the result, write it to `out` or RUN/eval/linear*.json. Ranks but 0 return {}."""
    result = evaluate_quietly(target, overrides, out)
    results.show(result, out)
    return result


def evaluate_quietly(target: str, overrides: list[str], out: Path | None = None) -> dict[str, Any]:
    """The same without printing the table."""
    settings = resolve("linear", overrides)
    assert isinstance(settings, LinearSettings)
    results.check_destination(out)
    return evaluate(open_target(target, device=settings.device), settings, out)


def grid(target: Target, settings: LinearSettings) -> list[Request]:
    """Layers x poolings that exist together: `pooled` only of the last layer. Raises UserError if nothing is left."""
    poolings: tuple[str, ...] = settings.pooling or ("pooled",)
    if settings.pooling is None and target.backbone is not None:
        has_cls = getattr(target.backbone.model, "cls_token", None) is not None
        poolings = ("pooled", "cls+patchmean") if has_cls else ("pooled", "patchmean")
    found = [Request(p, layer) for layer in settings.layer for p in poolings if p != "pooled" or layer == -1]
    if not found:
        raise UserError(
            f"layer={settings.layer} with pooling=pooled: it is the backbone's own output; use cls or patchmean"
        )
    check_requests(target, found)
    return list(dict.fromkeys(found))


def evaluate(
    target: Target, settings: LinearSettings, out: Path | None = None, pair: LabelledPair | None = None
) -> dict[str, Any]:
    """The same for an opened target (and, if given, opened data)."""
    pair, left_out = labelled_only(pair or open_pair(target, settings))
    if settings.augment and pair.train.source.config.frames is not None:
        raise UserError(
            "augment=true: the linear probe augments images; of clips it takes features that are kept: leave it out"
        )
    requests = grid(target, settings)
    transform = transform_for(target, pair.train, settings)
    train = extract(target, pair.train, settings, requests, transform, what="train features")
    val = extract(target, pair.val, settings, requests, transform, what="val features")
    readable = train.readable(requests[0]), val.readable(requests[0])
    fit, held_out = _hold_out(np.where(readable[0], pair.train_labels, -1), settings, pair.train.spec)
    val_rows = np.flatnonzero(readable[1])

    trainer = _Trainer(target, settings, transform, pair, train)
    probe = trainer.train(requests, settings.lr, fit, "probe")
    scores = probe.evaluate(trainer.data(requests, train, pair.train_labels, fit).batches(held_out))
    heads = [Head(r, lr) for r in requests for lr in settings.lr]
    best = _choose(scores)
    chosen = heads[best]
    refit = settings.refit if settings.refit is not None else not settings.augment
    if refit:
        rows = np.sort(np.concatenate([fit, held_out]))
        probe, names, column = trainer.train([chosen.request], (chosen.lr,), rows, "refit"), [chosen.request], 0
    else:
        rows, names, column = fit, requests, best
    final = probe.evaluate(trainer.data(names, val, pair.val_labels, rows).batches(val_rows))
    dist.barrier()  # rank 0's temporary feature files end with this function
    if not dist.is_main():
        return {}
    metrics = {"top1": final["top1"].flatten()[column].item()}
    if pair.classes > 5:
        metrics["top5"] = final["top5"].flatten()[column].item()
    table = [_row(head, trainer.batch(len(fit)), scores, i) for i, head in enumerate(heads)]
    protocol = {
        "pooling": chosen.request.pooling,
        "layer": chosen.request.layer,
        "lr": chosen.lr,
        "trained_on": _describe(settings, transform),
        "selected": f"best accuracy on a held-out {100 * settings.holdout:g}% of train "
        f"(seeded, stratified; {len(held_out)} images); val seen once",
        "refit": f"{'on all' if refit else 'no, trained on'} {len(rows)} of {len(pair.train)} training images",
        "optimizer": f"SGD, momentum {settings.momentum:g}, weight decay {settings.weight_decay:g}, "
        "cosine to 0, lr * batch / 256",
        "epochs": settings.epochs,
        "batch": trainer.batch(len(rows)),
        "standardized": settings.standardize,
        "bank_images": len(pair.train),
        "unlabelled_left_out": left_out,
        "unreadable_left_out": {"train": int((~readable[0]).sum()), "val": int((~readable[1]).sum())},
        "top1_interval_95": results.interval(metrics["top1"], len(val_rows)),
        **train.protocol,
        **pair.protocol,
        "seed": settings.seed,
        "versions": results.versions(),
    }
    note = _note(chosen, settings, scores)
    if note:
        protocol["note"] = note
    result = results.result("linear", target, metrics, protocol, table)
    results.save(result, target, out)
    return result


def _hold_out(labels: np.ndarray, settings: LinearSettings, spec: str) -> tuple[np.ndarray, np.ndarray]:
    fit, held_out = split(labels, fraction=settings.holdout, seed=settings.seed + 1)  # not the split that made val
    if len(fit) == 0 or len(held_out) == 0:
        raise UserError(
            f"{spec}: {len(labels)} labelled training images cannot be split for the choice of lr; give at least 2 a class"
        )
    return np.sort(fit), np.sort(held_out)


def _choose(scores: dict[str, Tensor]) -> int:
    """Highest top1, then lowest loss, then first; the same head on every rank."""
    top1, loss = scores["top1"].flatten().tolist(), scores["loss"].flatten().tolist()
    if not any(math.isfinite(v) for v in loss):
        raise UserError(
            "lr: every probe diverged (its loss is not finite); give smaller learning rates, as in lr=0.0001,0.001"
        )
    best = min(range(len(top1)), key=lambda i: (not math.isfinite(loss[i]), -top1[i], loss[i], i))
    return dist.agree(best + 1 if dist.is_main() else 0) - 1


def _row(head: Head, batch: int, scores: dict[str, Tensor], i: int) -> dict[str, Any]:
    loss = scores["loss"].flatten()[i].item()
    return {
        "pooling": head.request.pooling,
        "layer": head.request.layer,
        "lr": head.lr,
        "lr_used": head.lr * batch / 256,
        "holdout_top1": scores["top1"].flatten()[i].item(),
        "holdout_loss": loss if math.isfinite(loss) else None,
    }


def _describe(settings: LinearSettings, transform: Transform) -> str:
    if not settings.augment:
        return "cached features of centre crops"
    low, high = _AUGMENTATION.scale
    return f"augmented images, a forward pass each epoch: RandomResizedCrop({transform.size}, scale {low}-{high}), flip 0.5"


def _note(chosen: Head, settings: LinearSettings, scores: dict[str, Tensor]) -> str | None:
    notes = []
    if len(settings.lr) > 2 and chosen.lr in (min(settings.lr), max(settings.lr)):
        side = "smallest" if chosen.lr == min(settings.lr) else "largest"
        notes.append(f"the chosen lr={chosen.lr:g} is the {side} of the grid; a wider one may do better")
    diverged = int((~scores["loss"].isfinite()).sum())
    if diverged:
        notes.append(f"{diverged} of {scores['loss'].numel()} heads diverged")
    return "; ".join(notes) or None


class _Trainer:
    """Trains probes on cached features or on augmented images, standardised by the same statistics."""

    def __init__(
        self, target: Target, settings: LinearSettings, transform: Transform, pair: LabelledPair, train: FeatureFile
    ) -> None:
        self.target, self.settings, self.transform, self.pair, self.features = target, settings, transform, pair, train
        self._known: dict[tuple[Request, bytes], tuple[Tensor, Tensor]] = {}

    def statistics(self, requests: list[Request], rows: np.ndarray) -> list[tuple[Tensor, Tensor]] | None:
        """Of the centre crops of the training images `rows`; None: features are used as they are."""
        if not self.settings.standardize:
            return None
        out = []
        for request in requests:
            key = (request, rows.tobytes())
            if key not in self._known:
                mean, scale = statistics(self.features.array(request), rows)
                self._known[key] = (mean.to(self.target.device), scale.to(self.target.device))
            out.append(self._known[key])
        return out

    def data(self, requests: list[Request], file: FeatureFile, labels: np.ndarray, rows: np.ndarray) -> Cached:
        """Features of a file, standardised by the training images `rows`."""
        return Cached([file.array(r) for r in requests], labels, self.statistics(requests, rows), self.target.device)

    def batch(self, images: int) -> int:
        """Images a step: what was asked for, at most all there are, and on augmented images a multiple of the ranks."""
        batch = min(self.settings.batch, images)
        return max(1, batch // dist.world()) * dist.world() if self.settings.augment else batch

    def train(self, requests: list[Request], lrs: tuple[float, ...], rows: np.ndarray, what: str) -> Probe:
        """Heads on the training images `rows`."""
        s = self.settings
        recipe = Recipe(lrs, s.epochs, self.batch(len(rows)), self.pair.classes, s.momentum, s.weight_decay, s.seed)
        widths = [self.features.array(r).shape[1] for r in requests]
        probe = Probe(widths, recipe, self.target.device)
        if s.augment:
            self._on_images(probe, requests, rows, what)
            return probe
        progress = Progress(steps_of(recipe, len(rows)), f"{what}: step", enabled=dist.is_main())
        train_cached(probe, self.data(requests, self.features, self.pair.train_labels, rows), rows, progress.advance)
        progress.close()
        return probe

    def _on_images(self, probe: Probe, requests: list[Request], rows: np.ndarray, what: str) -> None:
        s, batch = self.settings, probe.recipe.batch
        steps = math.ceil(s.epochs * len(rows) / batch)
        view = View("probe", _AUGMENTATION.model_copy(update={"size": self.transform.size}), 0, 0)
        source = Labelled(self.pair.train, rows, self.pair.train_labels)
        loader = Loader(
            source, [view], seed=s.seed, global_batch=batch, accumulate=1, rank=dist.rank(), world=dist.world(),
            workers=s.workers, pin=self.target.device.type == "cuda",
        )  # fmt: skip
        forward = forward_function(self.target, s, requests)
        norms = self.statistics(requests, rows)
        progress = Progress(steps, f"{what} on augmented images: step", enabled=dist.is_main())
        for step, (micro,) in enumerate(loader.stream(0, steps)):
            images = photometric.apply(
                micro.crops[0], micro.params[0], self.transform.mean, self.transform.std, self.target.device
            )
            found = forward(images[0])  # [1, B, C, S, S] -> one [B, D] a request
            if norms is not None:
                found = [(x - mean) * scale for x, (mean, scale) in zip(found, norms)]
            probe.step(found, micro.labels.to(self.target.device), batch, step / steps)
            progress.advance(1)
        progress.close()
