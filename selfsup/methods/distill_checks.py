"""Whether the options of `method=distill`, its teacher and the data go together."""

from selfsup import dist
from selfsup.config import Config
from selfsup.data.base import Source
from selfsup.errors import UserError
from selfsup.methods.distill_terms import LOGITS, NEED_LABELS, RELATIONS, TermOptions
from selfsup.methods.teachers import Teacher


def count_classes(config: Config, options: TermOptions, teacher: Teacher) -> int | None:
    """How many the students tell: those of the data, which must be the teacher's where logits are compared."""
    found, on = config.data.classes, options.losses.on
    for name in NEED_LABELS:
        if name in on and found is None:
            raise UserError(
                f"method.losses.{name} learns from labels, and data.path={config.data.path} has none; give labelled images, "
                f"or method.losses.{name}=0"
            )
    compared = [name for name in LOGITS if name in on]
    if compared and teacher.classes is not None:
        if found is not None and found != teacher.classes:
            raise UserError(
                f"teacher={teacher.name} tells {teacher.classes} classes, the data have {found}, and method.losses.{compared[0]} "
                f"needs the same; give a teacher of {found}, data.classes={teacher.classes}, or losses between features"
            )
        return teacher.classes
    return found


def check_options(config: Config, o: TermOptions) -> None:
    """Raise UserError for what does not go together."""
    on, images = o.losses.on, config.views.global_.count * config.global_batch // (config.accumulate * dist.world())
    if config.views.global_.count < 1:
        raise UserError("views.global.count=0: the teacher sees global views; give 1 or more")
    remembers = "crd" in on and o.crd_negatives > 0
    for name, least in RELATIONS.items():
        if name in on and images < least and not (name == "crd" and remembers):
            raise UserError(
                f"method.losses.{name} compares the images of a micro-batch, and there is {images}; "
                f"raise global_batch, or lower accumulate={config.accumulate} or the number of processes"
            )
    if config.mix.name != "none":
        if config.teacher.cache is not None:
            raise UserError(
                f"mix={config.mix.name} with teacher.cache={config.teacher.cache}: a cache holds what the teacher says of single "
                "images; leave one of them out"
            )
        for name in ("dkd", "prototypes"):
            if name in on:
                raise UserError(
                    f"mix={config.mix.name} with method.losses.{name}, which needs one label or one object an image; use mix=none"
                )
        if remembers:
            raise UserError(
                f"mix={config.mix.name} with method.crd_negatives={o.crd_negatives}: a mixed image has no row of its own in the "
                "memory; use mix=none, or method.crd_negatives=0"
            )
    if config.teacher.cache_topk is not None and set(on) & {"dkd", "dist", "prototypes"}:
        name = next(n for n in ("dkd", "dist", "prototypes") if n in on)
        raise UserError(
            f"teacher.cache_topk={config.teacher.cache_topk}: method.losses.{name} needs all of what the teacher says; leave "
            "cache_topk out"
        )


def check_labels(config: Config, o: TermOptions, source: Source) -> None:
    """Raise UserError if a loss needs labels that the data do not have."""
    labels = source.labels
    missing = len(source) if labels is None else int((labels < 0).sum())
    free = set(o.losses.on) - set(NEED_LABELS)
    for name in NEED_LABELS:
        # beside another loss, ce takes those labels that there are
        if name in o.losses.on and missing and (missing == len(source) or name == "dkd" or not free):
            raise UserError(
                f"method.losses.{name} learns from labels, and {missing:,} of {len(source):,} images of "
                f"data.path={config.data.path} have none; give their labels, or method.losses.{name}=0"
            )
