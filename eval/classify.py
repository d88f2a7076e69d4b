"""Accuracy of what tells classes: every classifier of a run, or a folder that timm loads with its head.

Nothing is trained here and nothing is chosen on the val images: each classifier sees each of them once, as a centre crop.
"""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from selfsup import dist
from selfsup.backbones import Backbone
from selfsup.classifier import Trained, has_classifier, label_names, load_classifier
from selfsup.config import Config
from selfsup.data.eval_transform import eval_batches
from selfsup.errors import UserError

from . import results
from .class_figures import Answers, figures, per_class
from .class_names import LabelledImages, open_val
from .clips import over_clips
from .features import Transform
from .progress import Progress
from .settings import ClassifySettings, ImageSettings, resolve
from .targets import Target, open_device, run_config, tidy, weights_hash

OpenRun = Callable[[str], Trained]
"""What tells classes in a run or a checkpoint; the command line hands it in, as it needs the methods."""

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Subject:
    """Classifiers that share their classes and their images' format; in eval mode, on the target's device."""

    target: Target
    classifiers: dict[str, nn.Module]
    classes: int
    class_names: list[str] | None
    """None: not recorded; the training data may tell."""
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def run(target: str, overrides: list[str], out: Path | None = None, *, open_run: OpenRun) -> dict[str, Any]:
    """`selfsup eval classify TARGET`: print the result, write it to `out` or RUN/eval/classify.json. Ranks but 0 return {}."""
    result = evaluate_quietly(target, overrides, out, open_run=open_run)
    results.show(result, out)
    return result


def evaluate_quietly(
    target: str, overrides: list[str], out: Path | None = None, *, open_run: OpenRun
) -> dict[str, Any]:
    """The same without printing the table."""
    settings = resolve("classify", overrides)
    assert isinstance(settings, ClassifySettings)
    results.check_destination(out)
    subject = open_subject(target, settings.device, open_run)
    val = open_val(subject.target, settings, subject.classes, subject.class_names, len(subject.mean))
    found = measure(subject, val, settings, settings.precision)
    return report("classify", subject.target, found, val, settings, out)


# ----------------------------------------------------------------------------------------------------------- the target


def open_subject(target: str, device: str, open_run: OpenRun) -> Subject:
    """Open TARGET: a run, RUN/checkpoints/step_N, or a folder of timm's with a classifier. UserError if it tells no classes."""
    place = open_device(device)
    path = Path(target)
    if has_classifier(path):
        return _from_folder(target, path, place)
    if (path / "config.json").is_file():
        raise UserError(f"{target}: a backbone without a classifier; use selfsup eval linear, or eval knn")
    trained = open_run(target)
    if not trained.classifiers:
        raise UserError(
            f"{target}: method={trained.config.method.name} has no classifier; use selfsup eval linear, or eval knn"
        )
    one = path.absolute().parent.name == "checkpoints"
    run = path.absolute().parent.parent if one else path
    config = trained.config
    main = next(iter(trained.classifiers.values()))
    found = Target(
        target,
        "checkpoint" if one else "run",
        _backbone(main),
        weights_hash(main),
        place,
        tidy(run),
        config,
        trained.step,
    )
    subject = Subject(
        found,
        trained.classifiers,
        config.data.classes or 0,
        label_names(run / "classifier"),
        config.views.global_.size,
        config.mean,
        config.std,
    )
    return _ready(subject)


def _from_folder(target: str, path: Path, place: torch.device) -> Subject:
    loaded = load_classifier(path)
    loaded.module.activation = loaded.activation  # type: ignore[assignment]
    run = path.absolute().parent
    config: Config | None = run_config(run) if (run / "config.yaml").is_file() else None
    found = Target(
        target, "exported", None, weights_hash(loaded.module), place, tidy(run) if config is not None else None, config
    )
    size = config.views.global_.size if config is not None else loaded.size
    return _ready(
        Subject(found, {"head": loaded.module}, loaded.classes, loaded.label_names, size, loaded.mean, loaded.std)
    )


def _backbone(module: nn.Module) -> Backbone | None:
    found = getattr(module, "backbone", None)
    return found if isinstance(found, Backbone) else None


def _ready(subject: Subject) -> Subject:
    for module in subject.classifiers.values():
        module.eval().requires_grad_(False).to(subject.target.device)
    return subject


# -------------------------------------------------------------------------------------------------------- what they say


@torch.no_grad()
def answers(
    classifiers: Mapping[str, nn.Module],
    val: LabelledImages,
    transform: Transform,
    settings: ImageSettings,
    device: torch.device,
    *,
    precision: str = "fp32",
    what: str = "val images",
    quiet: bool = False,
) -> dict[str, Answers]:
    """What each classifier says of each val image, the same on every rank; each computes its own part of the rows.

    Raises UserError for logits that are not finite, and if no image can be read.
    """
    rows = len(val.images)
    table = {name: torch.zeros(rows, len(Answers._fields), dtype=torch.float64) for name in classifiers}
    mine = np.array_split(np.arange(rows), dist.world())[dist.rank()]
    labels = torch.from_numpy(val.labels)
    bad: list[tuple[str, str]] = []
    progress = Progress(len(mine), what, enabled=dist.is_main() and not quiet)
    error: UserError | None = None
    try:
        for x, _, ids in eval_batches(
            val.images.source, **asdict(transform), batch_size=settings.batch_size, workers=settings.workers,
            indices=val.images.indices[mine], on_bad=lambda *item: bad.append(item),
        ):  # fmt: skip
            at = torch.from_numpy(np.searchsorted(val.images.indices, ids.numpy()))  # indices ascend
            x = x.to(device, non_blocking=True)
            for name, module in classifiers.items():
                with _cast(device, precision):
                    whole = over_clips(lambda part, module=module: [module(part)], val.images.source)  # type: ignore[misc]
                    (logits,) = whole(x.to(next(module.parameters()).dtype))
                table[name][at] = _answers(name, module, logits.double(), labels[at].to(device))
            progress.advance(len(x))
    except UserError as cause:
        error = cause
    progress.close()
    dist.raise_together(error, "classification")
    out = {}
    for name, found in table.items():
        together = dist.all_reduce_(found.to(device)).cpu()  # the other ranks added 0
        out[name] = Answers(*together.unbind(1))
    if not any(a.readable.any() for a in out.values()):
        raise UserError(f"{val.images.spec}: none of its {rows} images can be read" + (f": {bad[0][1]}" if bad else ""))
    return out


def _cast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast(device.type, _DTYPES[precision]) if precision in _DTYPES else contextlib.nullcontext()


def _answers(name: str, module: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
    """logits [B, K], labels int64 [B] -> rows of `Answers`, float64 [B, 4] on the CPU. Of equal logits the lower class wins."""
    if not logits.isfinite().all():
        raise UserError(f"classifier {name!r}: logits that are not finite; use precision=fp32, or look at the weights")
    classes = torch.arange(logits.shape[1], device=logits.device)
    best = logits.amax(dim=1, keepdim=True)
    predicted = torch.where(logits == best, classes, logits.shape[1]).amin(dim=1)
    own = logits.gather(1, labels[:, None])  # [B, 1]
    before = (logits > own) | ((logits == own) & (classes < labels[:, None]))
    sigmoid = getattr(module, "activation", "softmax") == "sigmoid"
    sure = (best.sigmoid() if sigmoid else logits.softmax(dim=1).amax(dim=1, keepdim=True))[:, 0]
    columns = (predicted, before.sum(dim=1), sure, torch.ones_like(sure))
    return torch.stack([c.double() for c in columns], dim=1).cpu()


def transform_of(subject: Subject, settings: ImageSettings) -> Transform:
    """Shorter side, centre crop, the normalisation of training."""
    size = settings.size or subject.size
    if settings.resize is not None and settings.resize < size:
        raise UserError(f"resize={settings.resize} is smaller than the size {size}; the centre crop must fit inside")
    resize = settings.resize or (size if size < 96 else round(size * 256 / 224))
    if subject.target.backbone is not None:
        subject.target.backbone.check_size(size)
    return Transform(size, resize, settings.interpolation, subject.mean, subject.std)


# --------------------------------------------------------------------------------------------------------- the result


@dataclass
class Measured:
    """Answers of every classifier, and how they came about."""

    answers: dict[str, Answers]
    activations: dict[str, str]
    transform: Transform
    precision: str


def measure(subject: Subject, val: LabelledImages, settings: ImageSettings, precision: str = "fp32") -> Measured:
    """Look at every val image with every classifier."""
    transform = transform_of(subject, settings)
    found = answers(subject.classifiers, val, transform, settings, subject.target.device, precision=precision)
    activations = {n: getattr(m, "activation", "softmax") for n, m in subject.classifiers.items()}
    return Measured(found, activations, transform, precision)


def report(
    task: str,
    target: Target,
    measured: Measured,
    val: LabelledImages,
    settings: ClassifySettings | Any,
    out: Path | None,
    protocol: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The result of the first classifier, with a row for each; written with its confusion picture. {} on ranks but 0."""
    if not dist.is_main():
        return {}
    from . import confusion  # draws: not needed during training

    measurements = {name: figures(a, val.labels, val.classes, settings.bins) for name, a in measured.answers.items()}
    rows: list[dict[str, Any]] = [{"classifier": name, **found} for name, found in measurements.items()]
    name, first = next(iter(measured.answers.items()))
    seen = first.readable.numpy() > 0
    labels, predicted = val.labels[seen], first.predicted.numpy().astype(np.int64)[seen]
    metrics = measurements[name]
    t = measured.transform
    said: dict[str, Any] = {
        "classifier": name,
        "selected": "nothing: each classifier is shown, the main one first",
        "calibration": f"expected calibration error: {settings.bins} bins of equal width, l1, of the largest "
        f"{measured.activations[name]} probability",
        "top1_interval_95": results.interval(metrics["top1"], int(seen.sum())),
        "transform": asdict(t),
        "resolution": t.size,
        "precision": measured.precision,
        "device": target.device.type,
        "unreadable_left_out": {"val": int((~seen).sum())},
        **val.protocol,
        **(protocol or {}),
        "seed": settings.seed,
        "versions": results.versions(),
    }
    result = results.result(task, target, metrics, said, rows)
    result["per_class"] = per_class(labels, predicted, val.classes, val.class_names)
    result["confusions"] = confusion.worst(labels, predicted, val.class_names)
    file = out or results.path_in_run(task, target)
    if file is not None and val.classes <= confusion.LARGEST:
        counts = confusion.matrix(labels, predicted, val.classes)
        title = f"{target.name}, {name}: top-1 {metrics['top1']:.1%} of {len(labels):,} images"
        result["picture"] = str(confusion.draw(counts, val.class_names, title, file.with_suffix(".png")))
    results.save(result, target, out)
    return result
