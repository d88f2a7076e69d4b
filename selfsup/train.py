"""The training loop: one trainer for every method. `_loop` reads as a step does, from top to bottom."""

import contextlib
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from selfsup import dist, methods, placement, runfolder, runtime
from selfsup.backbones import Backbone
from selfsup.config import Config
from selfsup.data import photometric
from selfsup.data.loader import Batch
from selfsup.data.views import View
from selfsup.errors import EarlyStop, UserError
from selfsup.guard.fence import Fence
from selfsup.guard.lease import Lease
from selfsup.guard.watchdog import Watchdog
from selfsup.initialise import initialise
from selfsup.methods.contract import ViewBatch
from selfsup.optim import add_l1, clip_gradients, guarded_step, set_hyperparameters
from selfsup.profile import profiled
from selfsup.recorder import Recorder
from selfsup.run import KEPT_AT_MOST, Run
from selfsup.schedules import evaluate
from selfsup.signals import StopSignals

Evaluate = Callable[[Backbone, int], dict[str, float]]
Classify = Callable[[dict[str, nn.Module], int], dict[str, float]]


@dataclass(frozen=True)
class Evaluations:
    """What `eval.every` runs: figures of the exported backbone, and of what tells classes, where the method has such."""

    backbone: Evaluate | None = None
    classifiers: Classify | None = None

    def __call__(self, method: Any, step: int) -> dict[str, float]:
        """Of a method as `methods.contract` says."""
        figures = self.classifiers(found, step) if self.classifiers and (found := method.classifiers()) else {}
        if self.backbone is None:
            return figures
        for name, backbone in getattr(method, "further", dict)().items():
            figures |= {f"{name}/{key}": value for key, value in self.backbone(backbone, step).items()}
        return figures | self.backbone(method.export(), step)

    def figures(self, method: Any) -> list[str] | None:
        """What an evaluation of it will give; None if a part does not tell (it has no `figures`)."""
        backbone: Any = self.backbone
        classifiers: Any = self.classifiers
        names = list(method.classifiers()) if classifiers else []
        parts = [part for part in (backbone, classifiers if names else None) if part is not None]
        if not all(hasattr(part, "figures") for part in parts):
            return None
        own = list(backbone.figures) if backbone is not None else []
        further: Mapping[str, Any] = getattr(method, "further", dict)() if own else {}
        found = list(classifiers.figures(names)) if names else []
        return found + own + [f"{name}/{key}" for name in further for key in own]

    def __bool__(self) -> bool:
        return self.backbone is not None or self.classifiers is not None

    def close(self) -> None:
        """When training ends, however it does."""
        for part in (self.backbone, self.classifiers):
            getattr(part, "close", lambda: None)()


@dataclass(frozen=True)
class Result:
    """What a finished run left behind."""

    out: Path
    steps: int
    """Taken; fewer than planned if `early_stop` ended it."""
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
    classify: Classify | None = None,
    teacher: nn.Module | None = None,
    quiet: bool = False,
) -> Result:
    """Train as `config` says, into the run folder `out`.

    dataset: any torch `Dataset` of images or (image, label) pairs, instead of `data.path`. views: instead of the
    method's own. evaluate: called as evaluate(backbone, step) every `eval.every` steps; its figures are logged.
    classify: called as classify(classifiers, step) at the same steps, if the method has any (`contract.Method.classifiers`).
    If they have a method `close`, that is called at the end, however it ends; if they have `figures` (names, or of classify a
    function from the names of classifiers to them), a wrong `early_stop.metric` is refused before the first step.
    teacher: a trained module to learn from, instead of `config.teacher.path`; it is frozen where it is, and a resume needs the
    same again.
    A run that `early_stop` ends is done, and a resume leaves it so. Raises UserError for what the user can mend, EarlyStop
    when stopped by a signal or `stop_at` (resumable), RankLost when another process of the run is gone.
    """
    out = Path(out)
    stored = runfolder.stored_config(out) if resume else None
    if stored is not None:
        config = runfolder.adopt(config, stored)
    config = methods.complete(runtime.resolve(config))
    device = runtime.pick_device(config.device)
    dist.init(device, timeout_s=config.hang_timeout)
    places = placement.survey(device)
    with contextlib.ExitStack() as stack:
        lease = _claim(out, resume)
        stack.enter_context(lease if lease is not None else Fence(out))
        notes = runfolder.check_resume(config, stored) if stored is not None else []
        watch = Watchdog(
            out / "ranks",
            config.hang_timeout,
            rank=dist.rank(),
            world=dist.world(),
            on_abort=lease.release if lease is not None else lambda: None,
        )
        stack.enter_context(watch)
        evaluations = Evaluations(evaluate, classify)
        stack.callback(evaluations.close)
        stack.enter_context(runtime.settings(config))
        signals = stack.enter_context(StopSignals())
        run: Run | None = None
        try:
            run = Run.create(config, out, device, dataset, views, quiet, teacher)
            for note in [*places, *notes]:
                run.progress.note(note)
            if not (resume and run.resume()):
                initialise(run.method, config)
            dist.broadcast_module(run.method)
            if config.checkpoint.keep_best and not evaluations:
                run.progress.note("checkpoint.keep_best keeps nothing: there is no evaluation to choose by")
            if config.early_stop.patience and not evaluations:
                run.progress.note("early_stop stops nothing: there is no evaluation to judge")
            elif (figures := evaluations.figures(run.method)) is not None:
                run.early_stopping.check(figures)
            watch = stack.enter_context(profiled(run, watch))
            return _train(run, signals, watch, evaluations, lease.check if lease is not None else lambda: None)
        except (RuntimeError, MemoryError) as error:
            if run is not None and runtime.is_out_of_memory(error):
                raise run.out_of_memory(error) from None
            watch.explain(error)
            raise


def _claim(out: Path, resume: bool) -> Lease | None:
    """The run folder, for us alone; rank 0 holds it."""
    lease, error = None, None
    if dist.is_main():
        try:
            lease = runfolder.claim(out, resume)
        except UserError as cause:
            error = cause
    dist.raise_together(error, "preparing the run folder")
    return lease


def _train(
    run: Run,
    signals: StopSignals,
    watch: Watchdog,
    evaluations: Evaluations,
    still_ours: Callable[[], None],
) -> Result:
    error = None
    if dist.is_main():
        try:
            runfolder.write_config(run.out, run.config)
        except UserError as cause:
            error = cause
    dist.raise_together(error, "writing config.yaml")
    outcome: Outcome = "rolled back"
    while outcome == "rolled back":
        recorder = Recorder(
            run.out, run.step, run.plan, run.progress, run.monitor, run.spikes, run.config, still_ours=still_ours
        )
        stream = run.loader.stream(run.step, run.plan.steps)
        with contextlib.closing(recorder), contextlib.closing(run.writer), contextlib.closing(stream):
            outcome = _loop(run, stream, recorder, signals, watch, evaluations)
            watch.at("checkpoint", run.step)
            run.writer.wait()
    signals.finish()

    watch.at("export", run.step)
    run.export()
    if run.early_stopping.stopped and run.step < run.plan.steps:
        run.progress.note(run.early_stopping.why(run.step))
    elif run.step < run.plan.steps:
        why = f"stop_at={run.config.stop_at}"
        if outcome == "stopped":
            why = signals.received.name if signals.received else "another rank's signal"
        raise EarlyStop(f"stopped at step {run.step} of {run.plan.steps} ({why}); go on with --resume --out {run.out}")
    return Result(run.out, run.step, run.config, run.evaluations)


Outcome = Literal["done", "stopped", "rolled back"]


def _loop(
    run: Run,
    stream: Iterator[list[Batch]],
    recorder: Recorder,
    signals: StopSignals,
    watch: Watchdog,
    evaluations: Evaluations,
) -> Outcome:
    config, method, optimizer = run.config, run.method, run.optimizer
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    buffers = _moved_by_forward(method) if method.batch_statistics else []
    end = min(run.plan.steps, config.stop_at or run.plan.steps)
    stopped = False

    while run.step < end and not (stopped or run.early_stopping.stopped):
        watch.at("data", run.step)
        waited = run.loader.wait_seconds
        batches = next(stream)
        recorder.data_wait(run.loader.wait_seconds - waited)
        if run.step == 0 and config.pictures and dist.is_main():
            with recorder.clock_stopped():
                run.draw_views(batches[0])
        s = evaluate(run.schedules, run.step)
        head_only = run.step < run.head_only_steps
        set_hyperparameters(optimizer, s["lr"], s["wd"], s.get("wd_head"), freeze_backbone=head_only, rates=s)
        before = [b.clone() for b in buffers]
        optimizer.zero_grad(set_to_none=True)

        parts: dict[str, Tensor] = {}
        for micro, batch in enumerate(batches):
            watch.at("forward", run.step)
            views = _to_device(batch, run)
            if micro == len(batches) - 1:
                run.reducer.arm()
            with runtime.autocast(config):
                out = method(views, s)
            watch.at("backward", run.step)
            loss = out["loss"] / len(batches)
            (loss if run.scale is None else loss * run.scale.scale).backward()
            for name, value in out.items():
                parts[name] = parts.get(name, 0) + value.detach() / len(batches)
        watch.at("gradients", run.step)
        run.reducer.finish()

        watch.at("optimizer", run.step)
        if run.scale is not None:
            run.scale.unscale_(parameters)
        norm = clip_gradients(parameters, config.optimizer.clip, config.optimizer.clip_mode)
        add_l1(optimizer, config.optimizer.l1)
        finite = _verdict(parts["loss"], norm)
        left_out = run.step in run.left_out
        ok = torch.zeros_like(finite) if left_out else finite
        guarded_step(optimizer, ok)
        _put_back(buffers, before, ok)
        method.after_step(s, ok)
        if run.scale is not None:
            parts["loss_scale"] = run.scale.scale.clone()
            run.scale.update(finite)
        run.refused_in_row = (run.refused_in_row + 1) * (1 - finite)
        run.step += 1

        figures = {**parts, "grad_norm": norm, "refused": run.refused_in_row, "left_out": 1 - ok}
        recorder.record(run.step, s, figures)
        run.note_bad_files(batches)
        watch.at("agree", run.step)
        stopped = signals.agreed()
        outcome = _look(run, recorder, watch, evaluations, last=stopped or run.step == end)
        if outcome is not None:
            return outcome
    return "stopped" if stopped else "done"


def _look(run: Run, recorder: Recorder, watch: Watchdog, evaluations: Evaluations, last: bool) -> Outcome | None:
    """What happens at some steps only, when the host looks at the device: log, verdicts, evaluation, checkpoint."""
    config, step = run.config, run.step
    evaluates = bool(evaluations) and config.eval.every is not None
    evaluates = evaluates and (step % (config.eval.every or 1) == 0 or step == run.plan.steps)
    saves = last or step % config.checkpoint.every == 0 or (evaluates and config.checkpoint.keep_best > 0)
    if not (saves or evaluates or step % config.log_every == 0):
        return None
    figures: dict[str, float] = {}
    if evaluates:
        watch.at("evaluate", step)
        with recorder.clock_stopped():
            figures = run.evaluations = evaluations(run.method, step)
        saves |= run.early_stopping.judge(step, figures)
    watch.at("log", step)
    found = recorder.flush(figures, last=last, problem=run.problem())
    for refusal in found.refused:
        scale_too_large = run.scale is not None and refusal.in_row == 1  # routine in fp16: the scale is halved
        # not every rank of a large job: each writes the weights before it learns that enough is kept
        if dist.rank() in (refusal.ranks or [0])[:KEPT_AT_MOST] and not scale_too_large:
            run.keep_refused(refusal.step, refusal.parts, refusal.steps_since)
    if found.too_many is not None:
        raise found.too_many
    if found.spike is not None and run.roll_back(found.spike):
        return "rolled back"
    if saves:
        watch.at("checkpoint", step)
        with recorder.clock_stopped():
            run.save(figures, recorder.sync)
    return None


def _to_device(batch: Batch, run: Run) -> ViewBatch:
    channels = run.config.backbone.in_chans  # of an image, or of a frame
    images = [
        photometric.apply(
            crops, params, run.config.mean, run.config.std, run.device, run.dtype, crops.shape[2] // channels
        )
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
        rows=None if batch.draws is None else (batch.ids, batch.draws),
        places=batch.positions,
    )


def _verdict(loss: Tensor, norm: Tensor) -> Tensor:
    """1 if loss and gradients are finite on every rank, else 0: a device scalar that the host need not look at."""
    ok = (torch.isfinite(loss) & torch.isfinite(norm)).float()
    return dist.all_reduce_(ok, "min")


def _moved_by_forward(method: nn.Module) -> list[Tensor]:
    """Buffers of the method's networks that a forward pass may move: running statistics.

    Not the method's own, as a queue or a centre, nor those of modules which say that they move after steps only: what a forward
    pass gathers in them is for `after_step`, which is told that a step was refused (`contract.Method`).
    """
    modules = [m for m in method.modules() if m is not method and not getattr(m, "after_steps_only", False)]
    return [buffer for module in modules for buffer in module.buffers(recurse=False)]


def _put_back(buffers: list[Tensor], before: list[Tensor], ok: Tensor) -> None:
    """Running statistics as they were before a step that was refused."""
    for buffer, old in zip(buffers, before):
        buffer.copy_(torch.where(ok > 0, buffer, old))


class _CallableModule(types.ModuleType):
    """`selfsup.train` is this module and, as documented, also the function: calling the module trains."""

    def __call__(self, config: Config, **options: Any) -> Result:
        return train(config, **options)


sys.modules[__name__].__class__ = _CallableModule
