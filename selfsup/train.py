"""The training loop: one trainer for every method. `_loop` reads as a step does, from top to bottom."""

import contextlib
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from selfsup import checkpoint, dist, methods, runfolder, runtime
from selfsup.backbones import Backbone
from selfsup.backbones.export import export_timm
from selfsup.batchnorm import synchronise
from selfsup.config import Config
from selfsup.data import photometric
from selfsup.data.bad_files import BadFileLog
from selfsup.data.loader import Batch, Loader
from selfsup.data.sources import Source, open_source, wrap_dataset
from selfsup.data.views import View
from selfsup.errors import EarlyStop, UserError
from selfsup.health import CollapseMonitor
from selfsup.initialise import initialise
from selfsup.log import Progress
from selfsup.methods.contract import ViewBatch
from selfsup.optim import (
    LossScale,
    clip_gradients,
    create_optimizer,
    guarded_step,
    load_state_tensors,
    parameter_groups,
    set_hyperparameters,
    state_tensors,
)
from selfsup.recorder import Recorder
from selfsup.schedules import Plan, Schedule, evaluate, optimizer_schedules, peak_learning_rate, plan
from selfsup.signals import StopSignals

Evaluate = Callable[[Backbone, int], dict[str, float]]


@dataclass(frozen=True)
class Result:
    """What a finished run left behind."""

    out: Path
    steps: int
    config: Config
    evaluations: dict[str, float] = field(default_factory=dict)
    """Figures of the last periodic evaluation."""


def train(
    config: Config,
    *,
    out: str | Path,
    resume: bool = False,
    dataset: Any = None,
    views: list[View] | None = None,
    evaluate: Evaluate | None = None,
    quiet: bool = False,
) -> Result:
    """Train as `config` says, into the run folder `out`.

    dataset: any torch `Dataset` of images or (image, label) pairs, instead of `data.path`. views: instead of the
    method's own. evaluate: called as evaluate(backbone, step) every `eval.every` steps; its figures are logged.
    Raises UserError for what the user can mend, EarlyStop when stopped by a signal or `stop_at` (resumable).
    """
    out = Path(out)
    stored = runfolder.stored_config(out) if resume else None
    if stored is not None:
        config = runfolder.adopt(config, stored)
    config = methods.complete(runtime.resolve(config))
    device = runtime.pick_device(config.device)
    dist.init(device)
    error: BaseException | None = None
    try:
        if dist.is_main():
            runfolder.prepare(out, resume)
    except UserError as cause:
        error = cause
    dist.raise_together(error, "preparing the run folder")
    notes = runfolder.check_resume(config, stored) if stored is not None else []
    with runtime.settings(config), StopSignals() as signals:
        run = Run.create(config, out, device, dataset, views, quiet)
        for note in notes:
            run.progress.note(note)
        if not (resume and run.resume()):
            initialise(run.method, config)
        dist.broadcast_module(run.method)
        return _loop(run, signals, evaluate)


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
    bad_files: BadFileLog
    step: int = 0
    refused_in_row: Tensor = field(default_factory=lambda: torch.zeros(()))

    @classmethod
    def create(
        cls, config: Config, out: Path, device: torch.device, dataset: Any, views: list[View] | None, quiet: bool
    ) -> "Run":
        """Open the data, build the method and its optimizer, and say what will be done."""
        world, channels = dist.world(), config.backbone.in_chans
        if config.global_batch % (config.accumulate * world):
            raise UserError(
                f"global_batch={config.global_batch} is not divisible by accumulate={config.accumulate} x {world} processes; "
                f"use a multiple of {config.accumulate * world}"
            )
        if dataset is not None:
            source = wrap_dataset(dataset, channels=channels, config=config.data)
        else:
            source = open_source(config.data.path, channels=channels, config=config.data)
        length = plan(config, len(source))
        method = methods.create(config)
        dtype = torch.float64 if config.precision == "fp64" else torch.float32
        method.to(device=device, dtype=dtype)
        method.to(memory_format=torch.channels_last)  # convolutions are faster so, on CPUs and GPUs
        method.train()
        _configure(method, config)
        trainable = [(n, p) for n, p in method.named_parameters() if p.requires_grad]
        optimizer = create_optimizer(config.optimizer, parameter_groups(trainable, config.optimizer.layer_decay))
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
        )
        head_only = config.init_from.head_only
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
            bad_files=BadFileLog(out / "bad_files.jsonl", config.data.max_bad_fraction),
            refused_in_row=torch.zeros((), device=device),
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
            f"data {c.data.path}: {len(self.source):,} images · "
            f"{self.plan.steps:,} steps = {self.plan.epoch(self.plan.steps):.4g} epochs"
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

    def capture(self) -> checkpoint.State:
        """Everything a resume needs."""
        trainer: dict[str, Any] = {
            "step": self.step,
            "samples": self.step * self.config.global_batch,
            "data": self.source.fingerprint(),
            "runtime": runtime.fingerprint(),
            "health": self.monitor.state(),
            "refused_in_row": int(self.refused_in_row.item()),
        }
        model = dict(self.method.state_dict())
        if self.scale is not None:
            model.update({f"loss_scale.{k}": v for k, v in self.scale.state_dict().items()})
        return checkpoint.State(model, state_tensors(self.optimizer), checkpoint.rng_state(self.device), trainer)

    def resume(self) -> bool:
        """Continue from the newest valid checkpoint; without one say that it starts from the beginning: False."""
        root = self.out / "checkpoints"
        chosen, problems = checkpoint.newest_valid(root) if dist.is_main() else (None, [])
        step = dist.agree(-1 if chosen is None else checkpoint.step_of(chosen))  # rank 0 decides
        for problem in problems:
            self.progress.note(f"passing over a damaged checkpoint: {problem}")
        if step < 0:
            self.progress.note(f"nothing to resume in {self.out}: starting at step 0")
            return False
        folder = checkpoint.folder_of(root, step)
        state = checkpoint.load(folder, dist.rank())
        trainer = state.trainer
        if trainer["data"] != self.source.fingerprint():
            raise UserError(
                f"data.path={self.config.data.path}: its list of images is not the one this run was trained on; "
                "restore the files, or start a new run with --out"
            )
        now = runtime.fingerprint()
        different = [
            f"{k} {trainer['runtime'].get(k)} -> {v}" for k, v in now.items() if trainer["runtime"].get(k) != v
        ]
        if different:
            self.progress.note(f"resuming, but not bitwise: {', '.join(different)}")
        scale = {k.removeprefix("loss_scale."): v for k, v in state.model.items() if k.startswith("loss_scale.")}
        try:
            self.method.load_state_dict({k: v for k, v in state.model.items() if not k.startswith("loss_scale.")})
            load_state_tensors(self.optimizer, state.optimizer)
        except (RuntimeError, KeyError) as error:
            first = str(error).strip().splitlines()
            raise UserError(f"{folder}: does not fit this configuration: {' '.join(first[:2])[:300]}") from None
        if self.scale is not None and scale:
            self.scale.load_state_dict(scale)
        checkpoint.set_rng_state(state.rank, self.device)
        self.monitor.restore(trainer["health"])
        self.refused_in_row.fill_(trainer["refused_in_row"])
        self.step = int(trainer["step"])
        self.progress.start = self.step
        self.progress.note(f"resuming at step {self.step} from {folder}")
        return True

    def save(self) -> None:
        """A checkpoint of this step, by all ranks."""
        checkpoint.save(self.out / "checkpoints", self.step, self.capture(), self.config.checkpoint.keep_last)

    def export(self) -> None:
        """RUN/backbone."""
        error: UserError | None = None
        if dist.is_main():
            try:
                export_timm(self.method.export(), self.out / "backbone")
            except UserError as cause:
                error = cause
        dist.raise_together(error, "exporting the backbone")


def _configure(method: nn.Module, config: Config) -> None:
    """Options that change how a method computes, not what."""
    if dist.world() > 1:
        synchronise(method)
    for backbone in method.backbones().values():  # type: ignore[operator]
        if config.grad_checkpointing and any(p.requires_grad for p in backbone.parameters()):
            backbone.set_grad_checkpointing(True)
        if config.compile:
            backbone.compile(dynamic=False)


def _loop(run: Run, signals: StopSignals, evaluate_backbone: Evaluate | None) -> Result:
    config, method, optimizer = run.config, run.method, run.optimizer
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    buffers = list(method.buffers()) if method.batch_statistics else []
    end = min(run.plan.steps, config.stop_at or run.plan.steps)
    every = config.eval.every if evaluate_backbone is not None else None
    evaluations: dict[str, float] = {}
    if dist.is_main():
        runfolder.write_config(run.out, config)
    recorder = Recorder(run.out, run.step, run.plan, run.progress, run.monitor, config)
    stopped = False

    with contextlib.closing(recorder), contextlib.closing(run.loader.stream(run.step, run.plan.steps)) as stream:
        while run.step < end and not stopped:
            waited = run.loader.wait_seconds
            batches = next(stream)
            recorder.data_wait(run.loader.wait_seconds - waited)
            s = evaluate(run.schedules, run.step)
            set_hyperparameters(optimizer, s["lr"], s["wd"], freeze_backbone=run.step < run.head_only_steps)
            before = [b.clone() for b in buffers]
            optimizer.zero_grad(set_to_none=True)

            parts: dict[str, Tensor] = {}
            for micro, batch in enumerate(batches):
                views = _to_device(batch, run)
                if micro == len(batches) - 1:
                    run.reducer.arm()
                with runtime.autocast(config):
                    out = method(views, s)
                loss = out["loss"] / len(batches)
                (loss if run.scale is None else loss * run.scale.scale).backward()
                for name, value in out.items():
                    parts[name] = parts.get(name, 0) + value.detach() / len(batches)
            run.reducer.finish()

            if run.scale is not None:
                run.scale.unscale_(parameters)
            norm = clip_gradients(parameters, config.optimizer.clip, config.optimizer.clip_mode)
            ok = _verdict(parts["loss"], norm)
            guarded_step(optimizer, ok)
            _put_back(buffers, before, ok)
            method.after_step(s, ok)
            if run.scale is not None:
                run.scale.update(ok)
            run.refused_in_row = (run.refused_in_row + 1) * (1 - ok)
            run.step += 1

            recorder.record(run.step, s, {**parts, "grad_norm": norm, "refused": run.refused_in_row})
            for batch in batches:
                run.bad_files.add(batch.bad, len(batch.ids))
            stopped = signals.agreed()
            last = run.step == end or stopped
            if every and (run.step % every == 0 or run.step == run.plan.steps):
                with recorder.clock_stopped():
                    evaluations = evaluate_backbone(method.export(), run.step)  # type: ignore[misc]
                recorder.flush(evaluations, last=last)
            elif last or run.step % config.log_every == 0 or run.step % config.checkpoint.every == 0:
                recorder.flush(last=last)
            if last or run.step % config.checkpoint.every == 0:
                with recorder.clock_stopped():
                    recorder.sync()
                    run.save()
    signals.finish()

    run.export()
    if run.step < run.plan.steps:
        why = (
            signals.received.name
            if signals.received
            else "another rank's signal"
            if stopped
            else f"stop_at={config.stop_at}"
        )
        raise EarlyStop(f"stopped at step {run.step} of {run.plan.steps} ({why}); go on with --resume --out {run.out}")
    return Result(run.out, run.step, config, evaluations)


def _to_device(batch: Batch, run: Run) -> ViewBatch:
    images = [
        photometric.apply(crops, params, run.config.mean, run.config.std, run.device, run.dtype)
        for crops, params in zip(batch.crops, batch.params)
    ]
    move: Mapping[str, Any] = {"device": run.device, "non_blocking": True}
    return ViewBatch(
        images=images,
        positions=batch.positions.to(**move),
        labels=batch.labels.to(**move),
        ids=batch.ids.to(**move),
        step=run.step,
        global_batch=run.config.global_batch,
    )


def _verdict(loss: Tensor, norm: Tensor) -> Tensor:
    """1 if loss and gradients are finite on every rank, else 0: a device scalar that the host need not look at."""
    ok = (torch.isfinite(loss) & torch.isfinite(norm)).float()
    return dist.all_reduce_(ok, "min")


def _put_back(buffers: list[Tensor], before: list[Tensor], ok: Tensor) -> None:
    """Running statistics as they were before a step that was refused."""
    for buffer, old in zip(buffers, before):
        buffer.copy_(torch.where(ok > 0, buffer, old))


class _CallableModule(types.ModuleType):
    """`selfsup.train` is this module and, as documented, also the function: calling the module trains."""

    def __call__(self, config: Config, **options: Any) -> Result:
        return train(config, **options)


sys.modules[__name__].__class__ = _CallableModule
