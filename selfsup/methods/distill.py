"""Knowledge distillation: one or several students learn from one frozen teacher (Hinton et al., 2015, and what came after).

The teacher is anything with trained weights (see `teachers`), is asked once a step, and gives what the chosen losses need:
logits, features, maps, relations between images, or a DINO head's prototypes. Losses are mixed by weight, each with its own
options (`distill_terms`); labels are needed by those that say so alone. Students of different sizes (`students`) learn from
the same views and the same answers, each with its own losses' projectors.
"""

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import field_validator
from torch import Tensor, nn

from selfsup.backbones import Backbone, StochasticKeys, create_backbone
from selfsup.backbones.stochastic import key_stochastic_layers
from selfsup.config import BackboneConfig, Config, Probability, Section
from selfsup.data.base import Source
from selfsup.data.mixing import Mixer
from selfsup.data.views import View, multicrop
from selfsup.ema import ema_update
from selfsup.errors import UserError
from selfsup.losses.classification import one_hot, smooth
from selfsup.losses.numerics import at_least_float32
from selfsup.methods import distill_terms
from selfsup.methods.contract import Labels, ViewBatch
from selfsup.methods.distill_checks import check_labels, check_options, count_classes
from selfsup.methods.distill_terms import TermOptions, Terms
from selfsup.methods.network import drawing, has_batch_statistics, momentum_copy
from selfsup.methods.outputs import Layer, Outputs, features_and_maps, probe, resolve_layers
from selfsup.methods.teacher_cache import TeacherCache, ask, open_cache
from selfsup.methods.teacher_sources import open_teacher
from selfsup.methods.teachers import check_ranks, keep_sha256
from selfsup.randomness import mix
from selfsup.schedules import Plan, Schedule, averaging

_TAKEN = ("student", "teacher", "head", "ema")


class StudentOptions(Section):
    """One more student."""

    name: str
    """Of its folder, RUN/backbones/NAME, and of its figures."""
    backbone: BackboneConfig
    """As the section `backbone`; a name alone is enough."""
    layers: Layer | tuple[Layer, ...] = ()
    """As method.layers, of this student."""

    @field_validator("backbone", mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("name")
    @classmethod
    def _check_name(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", value) or value in _TAKEN:
            raise ValueError(f"letters, digits, - and _ are needed, and none of {', '.join(_TAKEN)}")
        return value


class DistillOptions(TermOptions):
    """Options of distillation; those of the losses are in `distill_terms`."""

    ema: Probability | None = None
    """Momentum of averaged weights of the students, which are evaluated and exported; null: there are none."""
    students: tuple[StudentOptions, ...] = ()
    """Further students beside `backbone`, of other sizes."""

    @field_validator("students")
    @classmethod
    def _check_names(cls, value: tuple[StudentOptions, ...]) -> tuple[StudentOptions, ...]:
        names = [student.name for student in value]
        if len(set(names)) < len(names):
            raise ValueError(f"two of the names {', '.join(names)} are the same")
        return value


class Student(nn.Module):
    """A backbone and, where the losses need one, a head that tells classes."""

    def __init__(self, backbone: Backbone, classes: int | None) -> None:
        super().__init__()
        self.backbone = backbone
        self.head: nn.Linear | None = None
        if classes is not None:
            self.head = nn.Linear(backbone.embed_dim, classes)
            nn.init.trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W], normalised -> logits [B, classes]; only with a head."""
        assert self.head is not None
        return self.head(self.backbone(images).pooled)


@dataclass(frozen=True)
class Learner:
    """What belongs to one student; `suffix` is that of its modules' names."""

    name: str
    suffix: str
    layers: list[int]
    random: StochasticKeys | None


class Distill(nn.Module):
    """`student`, `student_2`, ...; `terms`, ... hold what their losses learn; `teacher`, ... their averages, if there are any."""

    Options = DistillOptions
    labels: ClassVar[Labels] = "optional"
    takes_teacher: ClassVar[bool] = True

    def __init__(self, config: Config, options: DistillOptions, teacher: nn.Module | None = None) -> None:
        super().__init__()
        self.options, self.config = options, config
        losses = options.losses
        if not losses.on:
            raise UserError("method.losses: all weights are 0; give one, as in method.losses.soft=1")
        local = losses.prototypes > 0  # other losses compare the teacher's own views alone
        self._views = [view for view in multicrop(config.views) if local or view.kind == "global"]
        self.global_views = config.views.global_.count
        self.frozen = open_teacher(config, teacher)
        self.classes = count_classes(config, options, self.frozen)
        check_options(config, options)

        self.wanted, why = distill_terms.wanted_of(losses)
        self.frozen.check(self.wanted, why)
        if _layered(options) or options.teacher_layers:
            key = "method.teacher_layers"
            numbers = self.frozen.net.numbers(distill_terms.as_tuple(options.teacher_layers) or (-1,), key)
            self.wanted |= distill_terms.wanted_of(losses, numbers)[0]
        size, channels = config.views.global_.size, config.backbone.in_chans
        example = self.frozen(torch.zeros(1, channels, size, size), self.wanted)

        self.learners: list[Learner] = []
        self._add("", "", config.backbone, options.layers, "method.layers", example)
        for i, more in enumerate(options.students):
            spec = more.backbone.model_copy(update={"in_chans": channels})
            self._add(more.name, f"_{i + 2}", spec, more.layers, f"method.students.{more.name}.layers", example)
        self.batch_statistics = has_batch_statistics(self)
        self.mixer = Mixer(config.mix, config.seed, config.global_batch)
        self.cache: TeacherCache | None = None
        keep_sha256(self, self.frozen)

    def _add(
        self,
        name: str,
        suffix: str,
        spec: BackboneConfig,
        layers: Layer | tuple[Layer, ...],
        key: str,
        example: Outputs,
    ) -> None:
        """One student, its losses and its average."""
        config, options, size = self.config, self.options, self.config.views.global_.size
        backbone = create_backbone(spec, mean=config.mean, std=config.std, input_size=size)
        for crops in (config.views.global_, config.views.local):
            if any(view.crops is crops for view in self._views):
                backbone.check_size(crops.size)
        backbone.shortcuts = frozenset(config.shortcuts)
        numbers: list[int] = []
        if layers or _layered(options):
            numbers = resolve_layers(backbone, distill_terms.as_tuple(layers) or (-1,), key)
        if not _layered(options):
            numbers = []
        if len(numbers) != len(self.wanted.layers):
            raise UserError(
                f"{key}: {len(numbers)} layers for {len(self.wanted.layers)} of method.teacher_layers; each needs its counterpart"
            )
        student = Student(backbone, self.classes if distill_terms.has_head(options.losses) else None)
        seed = mix(config.seed, len(self.learners)) if suffix else config.seed  # the first draws what it would alone
        terms = Terms(options, probe(backbone, numbers, size), example, self.frozen.temperature, seed)
        average = momentum_copy(student) if options.ema is not None else None
        random = key_stochastic_layers(student, seed)
        self.add_module(f"student{suffix}", student)
        self.add_module(f"terms{suffix}", terms)
        if average is not None:
            self.add_module(f"teacher{suffix}", average)
        self.learners.append(Learner(name, suffix, numbers, random))

    def _parts(self) -> Iterator[tuple[Learner, Any, Any, Any]]:
        """(learner, student, terms, average or None) of every student."""
        for x in self.learners:
            average = getattr(self, f"teacher{x.suffix}", None)
            yield x, getattr(self, f"student{x.suffix}"), getattr(self, f"terms{x.suffix}"), average

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Distill":
        self.frozen.move(fn)  # it is no module of ours, and goes where we go
        return super()._apply(fn, recurse)

    def bind(self, source: Source, views: Sequence[View]) -> None:
        """The data are known: are there labels for the losses that need them; make CRD's memories, open the cache."""
        check_labels(self.config, self.options, source)
        for _, _, terms, _ in self._parts():
            if terms.memory is not None:
                terms.memory.fill(len(source))
        check_ranks(self, self.frozen)
        seen = list(views[: self.global_views])
        self.cache = open_cache(self.config, self.frozen, self.wanted, source, seen, self.options.temperature)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(self.parameters()).dtype

    def views(self) -> list[View]:
        """Global views, which the teacher sees as well; then local ones, if there are prototypes."""
        return self._views

    def schedules(self, plan: Plan) -> dict[str, Schedule]:
        """Momentum of the averages; when mixing stops."""
        out = self.mixer.schedules(plan)
        if (momentum := self.options.ema) is not None:
            out["momentum"] = averaging(momentum)
        return out

    def forward(self, batch: ViewBatch, s: Mapping[str, float]) -> dict[str, Tensor]:
        """See `contract.Method.forward`. images: global [G, B, C, S, S] and, for prototypes, local [L, B, C, s, s]."""
        views = batch.images[0].shape[0]
        encode = self._encode if self.options.losses.ce else _nothing
        mixed, said = self.mixer(
            batch.images[0], batch.labels, batch.positions, batch.step, encode, s.get("mix", 1.0)
        )  # [G, B, C, S, S], [B, K]
        images = mixed.flatten(0, 1)  # [G*B, C, S, S]
        labels, targets = batch.labels.repeat(views), said.repeat(views, 1)  # [G*B], [G*B, K]
        taught = ask(self.frozen, self.cache, images, self.wanted, batch)  # once for all students

        out: dict[str, Tensor] = {}
        total = images.new_zeros(())
        for x, student, terms, _ in self._parts():
            seen = self._see(student, x, images, batch.step, batch.keys(0))
            local = None
            if len(batch.images) > 1:
                keys = batch.keys(1, first_view=views)
                with drawing(x.random, batch.step, keys):
                    (local,) = student.backbone.embed([batch.images[1].flatten(0, 1)])  # [L*B, D]
            parts = terms(seen, taught, batch, local, labels, targets)
            total = total + terms.total(parts)
            prefix = f"loss/{x.name}/" if x.name else "loss/"
            out |= {f"{prefix}{name}": value.detach() for name, value in parts.items()}
            if seen.logits is not None and taught.logits is not None:
                agrees = seen.logits.detach().argmax(-1) == taught.logits.argmax(-1)
                out[f"{x.name}/agreement" if x.name else "agreement"] = agrees.float().mean()
        return {"loss": total, **out}

    def _encode(self, labels: Tensor) -> Tensor:
        hot = one_hot(labels, self.classes or 1).to(self.dtype)
        return smooth(hot, self.options.label_smoothing, self.options.smoothing_form)

    def _see(self, student: Student, x: Learner, images: Tensor, step: int, keys: Tensor) -> Outputs:
        """What a student makes of global views [G*B, C, S, S]."""
        wanted = self.wanted
        with drawing(x.random, step, keys):
            if wanted.patches or wanted.cls or x.layers:
                features, maps, _ = features_and_maps(student.backbone, images, x.layers)
                pooled, cls, patches = features.pooled, features.cls, features.patches
            else:
                (pooled,) = student.backbone.embed([images])
                cls, patches, maps = None, None, []
        logits = None if student.head is None else at_least_float32(student.head(pooled))
        return Outputs(logits=logits, pooled=pooled, cls=cls, patches=patches, maps=maps)

    @torch.no_grad()
    def after_step(self, s: Mapping[str, float], ok: Tensor) -> None:
        """Averages move towards their students, rows of CRD's memories towards what was seen."""
        for _, student, terms, average in self._parts():
            if terms.memory is not None:
                terms.memory.after_step(ok)
            if average is not None:
                ema_update(average, student, s["momentum"], ok)

    def export(self) -> Backbone:
        """A copy of the first student's backbone in eval mode: the averaged one, if there is one."""
        return self._exported(self.learners[0])

    def further(self) -> dict[str, Backbone]:
        """Copies of the other students' backbones, by name."""
        return {x.name: self._exported(x) for x in self.learners[1:]}

    def _exported(self, x: Learner) -> Backbone:
        kind = "student" if self.options.ema is None else "teacher"
        return copy.deepcopy(getattr(self, f"{kind}{x.suffix}").backbone).eval()

    def backbones(self) -> dict[str, Backbone]:
        """'student', 'student_2', ... and their averages 'teacher', ...; the frozen teacher is not among them."""
        out: dict[str, Backbone] = {}
        for x, student, _, average in self._parts():
            out[f"student{x.suffix}"] = student.backbone
            if average is not None:
                out[f"teacher{x.suffix}"] = average.backbone
        return out

    def classifiers(self) -> dict[str, nn.Module]:
        """The first student's ('ema', if there are averages, and 'head'), then the others by name."""
        return _named([(x.name, student, average) for x, student, _, average in self._parts()])

    @classmethod
    def classifiers_from(cls, config: Config, state: Mapping[str, Tensor]) -> dict[str, nn.Module]:
        """`classifiers` of a checkpoint, in eval mode; the teacher need not be there any more."""
        options = DistillOptions.model_validate(config.method.options)
        channels, size = config.backbone.in_chans, config.views.global_.size
        specs = [("", "", config.backbone)]
        specs += [(more.name, f"_{i + 2}", more.backbone) for i, more in enumerate(options.students)]
        found: list[tuple[str, Student, Student | None]] = []
        for name, suffix, spec in specs:
            head = state.get(f"student{suffix}.head.weight")
            spec = spec.model_copy(update={"in_chans": channels, "pretrained": False})
            nets: list[Student] = []
            for role in ("student", "teacher")[: 1 if options.ema is None else 2]:
                backbone = create_backbone(spec, mean=config.mean, std=config.std, input_size=size)
                nets.append(Student(backbone, None if head is None else head.shape[0]).eval())
                prefix = f"{role}{suffix}."
                nets[-1].load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
            found.append((name, nets[0], nets[1] if len(nets) > 1 else None))
        return _named(found)


def _named(students: Sequence[tuple[str, Student, Student | None]]) -> dict[str, nn.Module]:
    """Names of (name, student, average) as classifiers; {} for those without heads."""
    out: dict[str, nn.Module] = {}
    for name, student, average in students:
        if student.head is None:
            return {}
        if name:
            out[name] = average or student
        else:
            out |= {"head": student} if average is None else {"ema": average, "head": student}
    return out


def _layered(options: TermOptions) -> bool:
    return any(name in distill_terms.LAYERED for name in options.losses.on)


def _nothing(labels: Tensor) -> Tensor:
    """Of labels that no loss asks about."""
    return torch.zeros(labels.shape[0], 1, device=labels.device)
