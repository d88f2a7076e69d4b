"""What `selfsup eval` knows: its tasks, and what they get from the trainer and the methods, which they may not import."""

import importlib
import os
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfsup.config import Config
from selfsup.errors import UserError

if TYPE_CHECKING:
    from selfsup.data.views import View

EVALUATIONS = {
    "knn": "weighted k-nearest neighbours on frozen features (DINO's protocol)",
    "linear": "linear probe on frozen features: a grid of learning rates, layers and poolings in one pass",
    "classify": "what was trained to tell classes: top-1, top-5, calibration, confusions; nothing is trained",
    "exits": "each exit of a run of method=byot alone: top-1, operations, parameters",
    "finetune": "the whole backbone trained with labels, then the same figures",
    "segment": "a segmentation head trained on masks=FOLDER (head=linear, multilayer, mlp, upernet or unetr; trunk=frozen or "
    "finetune): mIoU, Dice, boundary IoU at the masks' own size, a sheet of pictures, and the model in RUN/eval/segment; that "
    "folder as TARGET is measured without training, or writes masks: predictions=OUT",
    "segment3d": "UNETR trained on volumes with masks (data=VOLUMES masks=MASKS; trunk=frozen or finetune): Dice of each class, "
    "and a sheet of slices; NIfTI or .npy",
    "detect": "a detector trained on boxes=FILE|FOLDER (COCO, VOC or YOLO; detector=fcos, retinanet or fasterrcnn; "
    "loss=smooth_l1, iou, giou, diou or ciou; trunk=frozen or finetune): mAP, mAP50, mAP75, each class, and a sheet of pictures",
    "attention": "picture: where each head of a ViT looks",
    "pca": "picture: patch features as colours, one PCA over all images",
    "tsne": "picture: a map of embeddings with thumbnails",
    "neighbors": "picture: images beside their nearest neighbours",
    "segment-knn": "masks by the nearest patches of other images (data=IMAGES masks=MASKS): mIoU; nothing is trained",
    "objects": "the main object of each image by tokencut, lost or attention; IoU where there are masks",
    "propagate": "the first frame's masks carried through a folder of frames (data=FRAMES masks=FIRST): J&F where all have masks",
    "fewshot": "1, 5, 10 labelled images of each class, many times: mean top-1 and its interval",
    "retrieval": "are a query's class mates ranked first: mAP",
    "duplicates": "pairs of images that are nearly the same",
    "robustness": "k-NN under corruptions of the val images, mild and strong; by=classifier: top-1 and calibration of what was "
    "trained to tell classes",
    "layers": "a linear probe on every layer, and the curve",
    "augmentations": "picture: the views that a RECIPE or RUN makes of its first images",
}


def evaluate(task: str, target: str, overrides: list[str], out: Path | None) -> None:
    """Run a task of EVALUATIONS: its result printed and written."""
    module: Any = importlib.import_module(f"selfsup.eval.{task.replace('-', '_')}")
    module.run(target, overrides, out, **_handed_in(task))


def _handed_in(task: str) -> dict[str, Any]:
    if task == "augmentations":
        return {"views": views_of}
    if task not in ("classify", "exits", "finetune", "robustness"):
        return {}
    from selfsup.methods.load import load_classifiers

    given: dict[str, Any] = {"open_run": load_classifiers}
    if task == "finetune":
        from selfsup.train import train

        given["train"] = lambda config, folder, images: train(config, out=folder, resume=True, dataset=images)
    return given


def views_of(config: Config) -> "list[View]":
    """The views of a configuration's method, for a picture of them."""
    import torch

    from selfsup import methods
    from selfsup.data.views import multicrop

    backbone = config.backbone.model_copy(update={"pretrained": False})
    try:
        with torch.device("meta"):  # networks of any size, without their weights
            return methods.create(methods.complete(config.model_copy(update={"backbone": backbone}))).views()
    except (UserError, RuntimeError, NotImplementedError):  # no teacher, no classes: what only training can tell
        return multicrop(config.views)


def classifying(config: Config, run: Path) -> Callable[[dict[str, Any], int], dict[str, float]] | None:
    """What tells classes, evaluated during training, if `eval.every` asks for it and the method learns from labels."""
    if not config.eval.every or config.eval.as_jobs or not _learns_classes(config):
        return None
    from selfsup.eval.periodic_classes import classify_callable

    found = classify_callable(config, run)
    if found is None and os.environ.get("RANK", "0") == "0":
        print("no top-1 during training: no val images; give data.val=FOLDER or eval.val=FOLDER", file=sys.stderr)
    return found


def final_table(config: Config, run: Path) -> None:
    """After training: the classifiers on the val images, if there are both, as `selfsup eval classify RUN` shows them.

    What goes wrong is a line on stderr: the training is done all the same.
    """
    if not _learns_classes(config):
        return
    from selfsup.eval.class_names import val_of
    from selfsup.eval.classify import run as classify
    from selfsup.methods.load import load_classifiers

    if val_of(config) is None:
        return
    try:
        trained = load_classifiers(run)
        if trained.classifiers:
            words = [f"workers={config.workers}", f"device={config.device}"]
            classify(str(run), words, None, open_run=lambda target: trained)
    except UserError as error:
        print(f"no evaluation of the classifiers: {error}", file=sys.stderr)


def _learns_classes(config: Config) -> bool:
    from selfsup import methods

    return getattr(methods.find(config.method.name), "labels", "unused") != "unused"


def described() -> str:
    """The tasks for a help page, one a paragraph, each line kept as it is."""
    rows = []
    for task, text in EVALUATIONS.items():
        first, *more = textwrap.wrap(text, 64)
        rows.append("\n".join([f"{task:14}{first}", *(" " * 14 + line for line in more)]))
    return "\b\nTasks:\n" + "\n".join(rows)


def check(task: str) -> None:
    """Raise UserError for a task that is none."""
    from selfsup.config import suggest

    if task not in EVALUATIONS:
        raise UserError(f"eval {task!r}{suggest(task, EVALUATIONS)}; known: {', '.join(EVALUATIONS)}")
