"""Fine-tuning: the trainer itself, with `method=supervised` from a backbone's weights; then accuracy on val images.

The result says what an evaluation of frozen features cannot: how far the backbone can be taken with these labels. Nothing is
chosen on the val images: the weights of the last step are evaluated, with the keys that were given.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from selfsup import config as configuration
from selfsup import dist, durable
from selfsup.config import Config
from selfsup.data.sources import Source
from selfsup.errors import UserError

from . import results
from .class_names import LabelledImages
from .classify import OpenRun, measure, open_subject, report
from .datasets import Labelled, LabelledPair, labelled_only, open_pair
from .settings import EvalData, FeatureSettings, FinetuneSettings, resolve
from .targets import Target, open_target

Train = Callable[[Config, Path, Source], Any]
"""train(config, run folder, images): the trainer, which resumes what it finds there; the command line hands it in."""

_KEY = "finetuned.json"


def run(
    target: str, overrides: list[str], out: Path | None = None, *, train: Train, open_run: OpenRun
) -> dict[str, Any]:
    """`selfsup eval finetune TARGET`: print the result, write it to `out` or RUN/eval/finetune.json. Ranks but 0 return {}.

    The fine-tuned run is RUN/eval/finetune, or lies beside `out`. Interrupted, it is gone on with by the same command; done,
    it is only evaluated again. Other weights or keys get another folder.
    """
    result = evaluate_quietly(target, overrides, out, train=train, open_run=open_run)
    results.show(result, out)
    return result


def evaluate_quietly(
    target: str, overrides: list[str], out: Path | None = None, *, train: Train, open_run: OpenRun
) -> dict[str, Any]:
    """The same without printing the table."""
    settings = resolve("finetune", overrides)
    assert isinstance(settings, FinetuneSettings)
    results.check_destination(out)
    opened = open_target(target, device=settings.device)
    if opened.backbone is None:
        raise UserError("eval finetune: pixels have no weights to train; give a run or a backbone")
    pair, left_out = labelled_only(open_pair(opened, _split_settings(settings)))
    _check_classes(pair)
    config = compose(opened, settings, pair)
    folder = _folder(opened, out, config, pair)
    images = Training(pair)
    opened.backbone.to("cpu")
    train(config, folder, images)

    subject = open_subject(str(folder), settings.device, open_run)
    val = LabelledImages(pair.val, pair.val_labels, pair.classes, pair.class_names, pair.protocol)
    measured = measure(subject, val, settings)
    facts = {
        "fine_tuned": str(folder),
        "trained_on": f"{len(pair.train):,} images, {subject.target.step} steps of {config.global_batch}",
        "unlabelled_left_out": left_out,
        "selected": "nothing: the weights of the last step, with the keys given",
        "training": subject.target.config.model_dump(mode="json", by_alias=True) if subject.target.config else {},
        "fine_tuned_hash": subject.target.checkpoint_hash,
    }
    return report("finetune", opened, measured, val, settings, out, facts)


class Training(Labelled):
    """The training images with the labels and the class names of the evaluation."""

    def __init__(self, pair: LabelledPair) -> None:
        super().__init__(pair.train, np.arange(len(pair.train)), pair.train_labels)
        self.classes = pair.class_names


def compose(target: Target, settings: FinetuneSettings, pair: LabelledPair) -> Config:
    """The configuration of the fine-tuning: the target's backbone, then the recipe, then the keys that were given."""
    backbone = target.backbone
    assert backbone is not None
    size = settings.size or (target.config.views.global_.size if target.config is not None else backbone.input_size)
    options = {k: v for k, v in backbone.options.items() if k not in ("num_classes", "in_chans")}
    if "img_size" in options:
        options["img_size"] = size  # positions are resampled when the weights are loaded
    base: dict[str, Any] = {
        "backbone": {
            "name": backbone.name,
            "pos_interp": backbone.pos_interp,
            "in_chans": backbone.in_chans,
            **options,
        },
        "views": {"global": {"size": size}},
        "workers": settings.workers,
        "seed": settings.seed,
        "device": settings.device,
    }
    if target.config is not None:
        base["precision"] = target.config.precision
    data: dict[str, Any] = {
        "path": pair.train.spec,
        "mean": backbone.mean,
        "std": backbone.std,
        "classes": pair.classes,
    }
    data |= {key: getattr(pair.train.source.config, key) for key in EvalData.model_fields if key not in ("path", "val")}
    forced: dict[str, Any] = {"data": data}
    if target.kind != "random":
        forced["init_from"] = {"path": target.name, "heads": "fresh"}
    values = configuration.merge(configuration.merge(base, settings.training), forced)
    return configuration.validate(Config, values, where="eval finetune")


def _split_settings(settings: FinetuneSettings) -> FeatureSettings:
    keys = FeatureSettings.model_fields.keys() & FinetuneSettings.model_fields.keys()
    return FeatureSettings(**{key: getattr(settings, key) for key in keys})


def _check_classes(pair: LabelledPair) -> None:
    unknown = np.setdiff1d(pair.val_labels, pair.train_labels)
    if len(unknown):
        first = int(unknown[0])
        name = pair.class_names[first] if pair.class_names and first < len(pair.class_names) else first
        raise UserError(
            f"{pair.val.spec} (val): {len(unknown)} of its classes have no training image ({name}, ...); "
            "give the same class folders on both sides, or a larger max_train"
        )


def _folder(target: Target, out: Path | None, config: Config, pair: LabelledPair) -> Path:
    """Where the fine-tuned run goes: a new folder, or the one in which the same fine-tuning was begun."""
    if out is not None:
        first = out.with_suffix("") if out.suffix else out.with_name(f"{out.name}_run")
    elif target.run is not None:
        first = target.run / "eval" / results.file_name("finetune", target.kind).removesuffix(".json")
    else:
        raise UserError(f"{target.name} belongs to no run: name a file with --out; the fine-tuned run goes beside it")
    text = f"{configuration.dump(config)}{target.checkpoint_hash}{pair.protocol['train_fingerprint']}"
    key = hashlib.sha256(text.encode()).hexdigest()
    chosen = 1
    if dist.is_main():
        while (folder := _numbered(first, chosen)).exists() and _key_of(folder) != key:
            chosen += 1
    chosen = dist.agree(chosen if dist.is_main() else 0)
    folder = _numbered(first, chosen)
    if dist.is_main():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            durable.write_atomically(folder / _KEY, json.dumps({"key": key, "target": target.facts()}, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"{folder}: cannot be written: {error.strerror}; name a file of yours with --out") from None
    dist.barrier()
    return folder


def _numbered(first: Path, number: int) -> Path:
    return first if number == 1 else first.with_name(f"{first.name}-{number}")


def _key_of(folder: Path) -> str | None:
    try:
        return str(json.loads((folder / _KEY).read_text())["key"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
