"""The parts of a run: built, described, captured into a checkpoint, and put back from one."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from selfsup import checkpoint, dist, methods, runtime
from selfsup.backbones.clips import check_frames
from selfsup.backbones.export import export_timm
from selfsup.batchnorm import synchronise
from selfsup.checkpoint import Retention, State
from selfsup.checkpoint_writer import Writer
from selfsup.classifier import NotAsTimm, export_classifier
from selfsup.config import Config, OpenSection, validate
from selfsup.data.bad_files import BadFileLog
from selfsup.data.loader import Batch, Loader
from selfsup.data.mixing import Mixer
from selfsup.data.modules import modules_of
from selfsup.data.sources import Source, open_source, wrap_dataset
from selfsup.data.views import View
from selfsup.data.volumes import open_volumes
from selfsup.early_stopping import EarlyStopping
from selfsup.errors import UserError
from selfsup.health import CollapseMonitor
from selfsup.log import Progress
from selfsup.optim import LossScale, create_optimizer, parameter_groups
from selfsup.optim_state import load_state_tensors, state_tensors
from selfsup.schedules import Plan, Schedule, evaluate, optimizer_schedules, peak_learning_rate, plan
from selfsup.spikes import SpikeDetector
from selfsup.wording import one_line

KEPT_AT_MOST = 3
"""Refused batches of a run that are kept for `selfsup replay`, each with the weights."""


class EarlyStopState(OpenSection):
    """What `EarlyStopping` knows."""

    metric: str | None
    mode: str
    best: float | None
    best_step: Annotated[int, Field(ge=0)]
    waited: Annotated[int, Field(ge=0)]


class TrainerState(OpenSection):
    """trainer.json of a checkpoint, as far as a resume reads it."""

    step: Annotated[int, Field(ge=0)]
    data: Any
    """Fingerprint of the list of images."""
    runtime: dict[str, Any]
    """What bitwise equality depends on."""
    health: list[str]
    """The collapse monitor's verdicts."""
    refused_in_row: Annotated[int, Field(ge=0)]
    losses: tuple[float, ...] = ()
    """The spike detector's window."""
    early_stop: EarlyStopState | None = None
    left_out: tuple[int, ...] = ()
    rollbacks: Annotated[int, Field(ge=0)] = 0


@dataclass
class Run:
    """The parts of a run. Everything that changes during training is in `capture` and `restore`."""

    config: Config
    out: Path
    device: torch.device
    dtype: torch.dtype
    source: Source
    loader: Loader
    method: Any
    optimizer: torch.optim.Optimizer
    reducer: dist.GradientReducer
    scale: LossScale | None
    plan: Plan
    schedules: dict[str, Schedule]
    head_only_steps: int
    progress: Progress
    monitor: CollapseMonitor
    spikes: SpikeDetector
    early_stopping: EarlyStopping
    bad_files: BadFileLog
    writer: Writer
    step: int = 0
    refused_in_row: Tensor = field(default_factory=lambda: torch.zeros(()))
    left_out: set[int] = field(default_factory=set)
    """Steps whose batches are not learned from, because of a spike."""
    rollbacks: int = 0
    evaluations: dict[str, float] = field(default_factory=dict)
    """Figures of the last periodic evaluation."""
    modules: list[nn.Module | None] = field(default_factory=list)
    """What images go through, for each tensor of a batch."""
    _problem: BaseException | None = None
    _kept: int = 0

    @classmethod
    def create(
        cls,
        config: Config,
        out: Path,
        device: torch.device,
        dataset: Any,
        views: list[View] | None,
        quiet: bool,
        teacher: nn.Module | None = None,
    ) -> "Run":
        """Open the data, build the method and its optimizer, and say what will be done."""
        world, channels = dist.world(), config.backbone.in_chans
        if config.global_batch % (config.accumulate * world):
            raise UserError(
                f"global_batch={config.global_batch} is not divisible by accumulate={config.accumulate} x {world} processes; "
                f"use a multiple of {config.accumulate * world}"
            )
        Mixer(config.mix, config.seed, config.global_batch).check(config.global_batch // (config.accumulate * world))
        if dataset is not None:
            source = wrap_dataset(dataset, channels=channels, config=config.data)
        elif config.volumes:
            source = open_volumes(config.data.path, channels=channels, config=config.data)
        else:
            source = open_source(config.data.path, channels=channels, config=config.data)
        config = _count_classes(config, source)
        length = plan(config, len(source))
        method = methods.create(config, teacher)
        check_frames(method.backbones(), config.data.frames)
        dtype = torch.float64 if config.precision == "fp64" else torch.float32
        method.to(device=device, dtype=dtype)
        method.to(memory_format=torch.channels_last)  # convolutions are faster so, on CPUs and GPUs
        method.train()
        _configure(method, config)
        trainable = [(n, p) for n, p in method.named_parameters() if p.requires_grad]
        o, rate_of = config.optimizer, getattr(method, "rate_of", None)
        groups = parameter_groups(trainable, o.layer_decay, o.decay_all, rate_of)
        optimizer = create_optimizer(config.optimizer, groups, peak_learning_rate(config))
        loader = Loader(
            source,
            views or method.views(),
            seed=config.seed,
            global_batch=config.global_batch,
            accumulate=config.accumulate,
            rank=dist.rank(),
            world=world,
            workers=config.workers,
            pin=device.type == "cuda",
            repeat=config.teacher.cache_epochs if config.teacher.cache is not None else None,
            copies=config.data.copies,
        )
        if hasattr(method, "bind"):
            error: UserError | None = None
            try:
                method.bind(source, views or method.views())
            except UserError as cause:
                error = cause
            dist.raise_together(error, "preparing the method")
        head_only = config.init_from.head_only
        retention = Retention(**config.checkpoint.model_dump(exclude={"every"}))
        run = cls(
            config=config,
            out=out,
            device=device,
            dtype=dtype,
            source=source,
            loader=loader,
            method=method,
            optimizer=optimizer,
            reducer=dist.GradientReducer([p for _, p in trainable]),
            scale=LossScale().to(device) if config.precision == "fp16" else None,
            plan=length,
            schedules={**optimizer_schedules(config, length), **method.schedules(length)},
            head_only_steps=length.steps_of(head_only) if head_only else 0,
            progress=Progress(length.steps, 0, every=max(50, config.log_every), enabled=dist.is_main() and not quiet),
            monitor=CollapseMonitor(),
            spikes=SpikeDetector(config.spike.factor, config.spike.window),
            early_stopping=EarlyStopping(**config.early_stop.model_dump()),
            bad_files=BadFileLog(out / "bad_files.jsonl", config.data.max_bad_fraction),
            writer=Writer(out / "checkpoints", retention),
            refused_in_row=torch.zeros((), device=device),
            modules=modules_of(loader.make.groups, channels, device),
        )
        run.announce()
        return run

    def announce(self) -> None:
        """What will be trained on what, with the figures people get wrong."""
        c, o = self.config, self.config.optimizer
        rule = "as given" if o.lr is not None else f"{o.base_lr:g} x {c.global_batch} / 256"
        count = sum(p.numel() for p in self.method.parameters() if p.requires_grad) / 1e6
        per_device = c.global_batch // (c.accumulate * dist.world())
        note = self.progress.note
        note(
            f"{c.method.name} · {c.backbone.name}, {count:.2f} M parameters trained · "
            f"{c.device}, {c.precision}, {c.threads} threads"
        )
        note(
            f"data {c.data.path}: {len(self.source):,} {'images' if c.data.frames is None else 'videos'} · "
            f"{self.plan.steps:,} steps = {self.plan.epoch(self.plan.steps):.4g} epochs"
        )
        if (channels := c.backbone.in_chans) != 3 and (given := c.views.colour_keys()):
            note(
                f"images of {channels} channels: {', '.join(given)} need colour and are left out; "
                "brightness, contrast, blur and solarization work on each channel alone"
            )
        note(
            f"global batch {c.global_batch} = {dist.world()} processes x {c.accumulate} accumulated x {per_device} · "
            f"learning rate {peak_learning_rate(c):.3g} ({rule})"
        )
        if self.method.batch_statistics and c.accumulate > 1:
            note(
                f"batch norm sees {per_device} images at a time: accumulate={c.accumulate} is not equal to one large batch"
            )

    # ------------------------------------------------------------------------------------------------ state

    def capture(self) -> State:
        """Everything a resume needs."""
        trainer: dict[str, Any] = {
            "step": self.step,
            "steps": self.plan.steps,
            "samples": self.step * self.config.global_batch,
            "data": self.source.fingerprint(),
            "runtime": runtime.fingerprint(),
            "health": self.monitor.state(),
            "losses": self.spikes.state(),
            "early_stop": self.early_stopping.state(),
            "left_out": sorted(self.left_out),
            "rollbacks": self.rollbacks,
            "refused_in_row": int(self.refused_in_row.item()),
        }
        model = dict(self.method.state_dict())
        if self.scale is not None:
            model.update({f"loss_scale.{k}": v for k, v in self.scale.state_dict().items()})
        return State(model, state_tensors(self.optimizer), checkpoint.rng_state(self.device), trainer)

    def resume(self) -> bool:
        """Continue from the newest valid checkpoint; without one say that it starts from the beginning: False."""
        folder = self._newest()
        if folder is None:
            self.progress.note(f"nothing to resume in {self.out}: starting at step 0")
            return False
        state = checkpoint.load(folder, dist.rank())
        trainer = _trainer_state(state, folder)
        if trainer.data != self.source.fingerprint():
            raise UserError(
                f"data.path={self.config.data.path}: its list of images is not the one this run was trained on; "
                "restore the files, or start a new run with --out"
            )
        then, now = trainer.runtime, runtime.fingerprint()
        different = [f"{k} {then.get(k)} -> {v}" for k, v in now.items() if then.get(k) != v]
        if different:
            self.progress.note(f"resuming, but not bitwise: {', '.join(different)}")
        self._restore(state, folder)
        self.left_out, self.rollbacks = set(trainer.left_out), trainer.rollbacks
        self.progress.start = self.step
        self.progress.note(f"resuming at step {self.step} from {folder}")
        return True

    def roll_back(self, spike: int) -> bool:
        """Go back to the newest checkpoint and leave out the batches around the loss of step `spike` (1 is the first).

        False, with an announcement, if there is none yet. Raises UserError when it happened too often.
        """
        self.writer.wait()
        options = self.config.spike
        what = f"step {spike}: the loss spiked (above {options.factor:g} x the median of the steps before)"
        if self.rollbacks >= options.max_rollbacks:
            raise UserError(
                f"{what} after {self.rollbacks} rollbacks (spike.max_rollbacks={options.max_rollbacks}).\n--resume with a larger "
                f"spike.max_rollbacks or spike.factor, or start a new run with a lower learning rate and init_from={self.out}"
            )
        folder = self._newest()
        if folder is None:
            self.progress.note(f"{what}, and there is no checkpoint yet to go back to")
            return False
        self._restore(checkpoint.load(folder, dist.rank()), folder)
        first = max(spike - options.skip, self.step)  # those before the checkpoint are in its weights
        self.left_out |= set(range(first, spike))
        self.rollbacks += 1
        steps = f"step {spike}" if first + 1 == spike else f"steps {first + 1} to {spike}"
        self.progress.note(f"{what}; back to step {self.step}, leaving out {steps}")
        return True

    def _newest(self) -> Path | None:
        root = self.out / "checkpoints"
        chosen: Path | None = None
        problems: list[str] = []
        error: UserError | None = None
        if dist.is_main():
            try:
                chosen, problems = checkpoint.newest_valid(root)
            except UserError as cause:
                error = cause
        dist.raise_together(error, "looking for a checkpoint")
        step = dist.agree(-1 if chosen is None else checkpoint.step_of(chosen))  # rank 0 decides
        for problem in problems:
            self.progress.note(f"passing over a damaged checkpoint: {problem}")
        return None if step < 0 else checkpoint.folder_of(root, step)

    def _restore(self, state: State, folder: Path) -> None:
        trainer = _trainer_state(state, folder)
        scale = {k.removeprefix("loss_scale."): v for k, v in state.model.items() if k.startswith("loss_scale.")}
        try:
            self.method.load_state_dict({k: v for k, v in state.model.items() if not k.startswith("loss_scale.")})
            load_state_tensors(self.optimizer, state.optimizer)
            checkpoint.set_rng_state(state.rank, self.device)
            if self.scale is not None and scale:
                self.scale.load_state_dict(scale)
        except (RuntimeError, KeyError, TypeError, ValueError) as error:
            first = str(error).strip().splitlines()
            raise UserError(f"{folder}: does not fit this configuration: {' '.join(first[:2])[:300]}") from None
        self.monitor.restore(trainer.health)
        self.spikes.restore(trainer.losses)
        self.early_stopping.restore(trainer.early_stop.model_dump() if trainer.early_stop else {})
        self.refused_in_row.fill_(trainer.refused_in_row)
        self.step = trainer.step

    def save(self, figures: dict[str, float], may_commit: Callable[[], None]) -> None:
        """Begin a checkpoint of this step, by all ranks; figures: of an evaluation at this step."""
        self.writer.save(self.step, self.capture(), figures, may_commit)

    def note_bad_files(self, batches: list[Batch]) -> None:
        """Count and list images that could not be read; too many are a problem that `problem` tells later."""
        for batch in batches:
            try:
                self.bad_files.add(batch.bad, len(batch.ids))
            except UserError as error:
                self._problem = self._problem or error

    def draw_views(self, batch: Batch) -> None:
        """RUN/pictures/augmentations.png: the views of a batch's first images. No run fails for want of it: it is a note."""
        try:
            from selfsup.data.sheet import sheet, write_sheet  # once a run

            make = self.loader.make
            drawn = sheet(batch, make.groups, self.config.mean, self.config.std, part=make.part)
            write_sheet(self.out / "pictures" / "augmentations.png", drawn)
        except Exception as error:
            self.progress.note(f"no picture of the augmentations: {one_line(error, 200)}")

    def problem(self) -> BaseException | None:
        """What must stop the run, found on this rank since the last look: a save that failed, too many bad images."""
        return self._problem or self.writer.failed()

    def keep_refused(self, step: int, parts: dict[str, float], steps_since: int) -> None:
        """What `selfsup replay` needs of refused step `step` (1 is the first), under RUN/refused."""
        if self._kept >= KEPT_AT_MOST:
            return
        from selfsup import replay  # pictures and all: seldom needed

        self._kept += 1
        index = step - 1
        try:
            batches = [self.loader.make(index, micro) for micro in range(self.config.accumulate)]
        except (UserError, OSError, MemoryError) as error:  # read again from a disk that may have gone
            self.progress.note(f"step {step}: its batch cannot be kept: {error}")
            return
        names = [self.source.name(i) for batch in batches for i in batch.ids.tolist()]
        folder = replay.keep(
            self.out / "refused",
            step=step,
            rank=dist.rank(),
            batches=batches,
            method=self.method,
            s=evaluate(self.schedules, index),
            config=self.config,
            names=names,
            parts=parts,
            steps_since=steps_since,
            limit=KEPT_AT_MOST,
        )
        if folder is not None:
            self.progress.note(f"step {step}: its batch is kept; selfsup replay {folder}")

    def out_of_memory(self, error: BaseException) -> UserError:
        """What was asked of the memory, and what to lower."""
        c = self.config
        images = c.global_batch // (c.accumulate * dist.world())
        views = " + ".join(f"{v.count} x {v.size}" for v in (c.views.global_, c.views.local) if v.count)
        peak = ""
        if self.device.type == "cuda":
            used, total = torch.cuda.max_memory_reserved(self.device), torch.cuda.mem_get_info(self.device)[1]
            peak = f", {used / 2**30:.1f} of {total / 2**30:.1f} GiB reserved on {self.device}"
        lower = [f"accumulate={c.accumulate * 2} (smaller pieces, the same batch)"] if images > 1 else []
        lower += [] if c.grad_checkpointing else ["grad_checkpointing=true"]
        return UserError(
            f"out of memory in step {self.step + 1} on rank {dist.rank()}: {images} images at a time "
            f"(global_batch={c.global_batch}, accumulate={c.accumulate}, {dist.world()} processes), views of {views} pixels, "
            f"{c.precision}{peak}: {' '.join(str(error).split())[:160]}\n"
            f"try {', '.join([*lower, 'fewer or smaller views', 'a smaller backbone'])}"
        )

    def export(self) -> None:
        """RUN/backbone, RUN/backbones/NAME for every further one, RUN/classifier where timm can express what tells classes."""
        error: UserError | None = None
        if dist.is_main():
            try:
                export_timm(self.method.export(), self.out / "backbone")
                for name, backbone in getattr(self.method, "further", dict)().items():
                    export_timm(backbone, self.out / "backbones" / name)
                self._export_classifier()
            except UserError as cause:
                error = cause
        dist.raise_together(error, "exporting the backbone")

    def _export_classifier(self) -> None:
        for name, main in list(self.method.classifiers().items())[:1]:
            try:
                export_classifier(main, self.out / "classifier", self.source.classes)
            except NotAsTimm as reason:
                self.progress.note(f"no {self.out / 'classifier'}: {name!r} is no timm model: {reason}")


def _count_classes(config: Config, source: Source) -> Config:
    """`config` with `data.classes`, if the method learns from labels. Raises UserError if it cannot from these."""
    use = getattr(methods.find(config.method.name), "labels", "unused")
    if use == "unused":
        if config.mix.name != "none":
            raise UserError(
                f"mix.name={config.mix.name}: method={config.method.name} does not learn from labels, and mixes nothing; "
                "use mix=none"
            )
        return config
    labels, path = source.labels, config.data.path
    missing = len(source) if labels is None else int((labels < 0).sum())
    if use == "needed" and missing:
        raise UserError(
            f"data.path={path}: {missing:,} of {len(source):,} images have no label, and method={config.method.name} learns from "
            "labels; give class folders, or a list with a label a line"
        )
    found = 0 if labels is None or missing == len(source) else int(labels.max()) + 1
    classes = config.data.classes
    if classes is None:
        classes = found or None
    elif found > classes:
        raise UserError(
            f"data.classes={classes}: {path} has labels up to {found - 1}; use data.classes={found} or more"
        )
    return config.model_copy(update={"data": config.data.model_copy(update={"classes": classes})})


def _trainer_state(state: State, folder: Path) -> TrainerState:
    return validate(TrainerState, dict(state.trainer), where=str(folder / "trainer.json"))


def _configure(method: nn.Module, config: Config) -> None:
    """Options that change how a method computes, not what."""
    if dist.world() > 1:
        synchronise(method)
    for backbone in method.backbones().values():  # type: ignore[operator]
        if config.grad_checkpointing and any(p.requires_grad for p in backbone.parameters()):
            backbone.set_grad_checkpointing(True)
        if config.compile:
            backbone.compile(dynamic=False)
