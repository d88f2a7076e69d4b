"""Writing checkpoints in the background: a step waits for the copy to host memory, and for nothing else."""

import json
import os
import secrets
import shutil
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selfsup import dist, durable, tensorfile
from selfsup.checkpoint import FORMAT, InvalidCheckpoint, Retention, State, clean, folder_of, prune, rank_file, verify
from selfsup.durable import TEMPORARY
from selfsup.errors import DiskError, UserError

_NICENESS = 10
"""Of the writing thread: the training threads go first."""


class Writer:
    """Writes a run's checkpoints in the background. Every rank has one and calls the same methods at the same steps."""

    def __init__(self, root: Path, retention: Retention) -> None:
        self.root, self.retention = root, retention
        self._host: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._trusted: set[int] = set()

    def save(
        self,
        step: int,
        state: State,
        figures: Mapping[str, float] | None = None,
        may_commit: Callable[[], None] = lambda: None,
    ) -> None:
        """Copy `state` to the host and begin to write RUN/checkpoints/step_N; waits for the one before.

        figures: of an evaluation at this step, by which `keep_best` chooses. may_commit: called in the thread, on rank 0,
        just before the rename; raises if there must be none. Raises what the write before this one raised.
        """
        self.wait()
        copy = self._copy(state)
        self._thread = threading.Thread(
            target=self._run, args=(step, copy, dict(figures or {}), may_commit), daemon=True
        )
        self._thread.start()

    def failed(self) -> BaseException | None:
        """What the last write raised, if it has ended so. Does not wait."""
        return self._error

    def wait(self) -> None:
        """Until everything is on the disk. Raises UserError when the disk was full or not writable."""
        if self._thread is not None:
            self._thread.join()  # signals are still noticed
            self._thread = None
        if self._error is not None:
            raise self._error

    def close(self, patience_s: float = 60) -> None:
        """Give a write under way the time to end; raises nothing."""
        if self._thread is not None:
            self._thread.join(patience_s)

    def _copy(self, state: State) -> State:
        """What this rank writes of it on the host, in memory that is kept from save to save."""
        parts: dict[str, dict[str, Tensor]] = {}
        cuda = False
        written = ("model", "optimizer", "rank") if dist.is_main() else ("rank",)
        for part in ("model", "optimizer", "rank"):
            parts[part] = {}
            if part not in written:
                continue
            for name, value in getattr(state, part).items():
                value = value.detach()
                host = self._host.get(key := f"{part}/{name}")
                if host is None or host.shape != value.shape or host.dtype != value.dtype:
                    host = self._host[key] = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
                host.copy_(value, non_blocking=True)
                cuda |= value.is_cuda
                parts[part][name] = host
        if cuda:
            torch.cuda.current_stream().synchronize()
        return State(**parts, trainer=json.loads(json.dumps(dict(state.trainer))))

    def _run(self, step: int, state: State, figures: Mapping[str, float], may_commit: Callable[[], None]) -> None:
        if sys.platform == "linux":
            with suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        try:
            _write(self.root, step, state, self.retention, figures, may_commit, self._trusted)
        except BaseException as error:  # raised in the trainer's thread
            self._error = error


def save(
    root: Path, step: int, state: State, retention: Retention | None = None, figures: Mapping[str, float] | None = None
) -> Path:
    """Write RUN/checkpoints/step_N and return when it is on the disk; every rank calls it. Returns the folder.

    Raises UserError when the disk is full or not writable: earlier checkpoints are untouched then.
    """
    writer = Writer(root, retention or Retention())
    writer.save(step, state, figures)
    writer.wait()
    return folder_of(root, step)


def _write(
    root: Path,
    step: int,
    state: State,
    retention: Retention,
    figures: Mapping[str, float],
    may_commit: Callable[[], None],
    trusted: set[int],
) -> None:
    final, main = folder_of(root, step), dist.is_main()
    temporary = root / f"{TEMPORARY}{final.name}-{secrets.token_hex(8)}"  # nobody else's, not even a former owner's

    def prepare() -> bytes:
        if main:
            root.mkdir(exist_ok=True)  # not its parents: a run folder that was removed stays removed
            clean(root)
            durable.make_folder(temporary)
        return temporary.name.rpartition("-")[2].encode()

    written: dict[str, dict[str, Any]] = {}

    def put(name: str, content: Any) -> bytes:
        size, digest = durable.write(temporary / name, content)
        durable.fsync(temporary / name)
        written[name] = {"bytes": size, "sha256": digest}
        return size.to_bytes(8, "little") + bytes.fromhex(digest)

    def files() -> bytes:
        own = put(rank_file(dist.rank()), tensorfile.pieces(state.rank))
        if main:
            put("model.safetensors", tensorfile.pieces(state.model))
            put("optimizer.safetensors", tensorfile.pieces(state.optimizer))
            put("trainer.json", [json.dumps(state.trainer, indent=1, sort_keys=True).encode()])
        return own

    def commit() -> bytes:
        if not main:
            return b""
        entries = dict(sorted(written.items()))
        manifest = {
            "format": FORMAT,
            "step": step,
            "world_size": dist.world(),
            "torch": torch.__version__,
            "figures": dict(figures),
            "files": entries,
        }
        put("MANIFEST.json", [json.dumps(manifest, indent=1, sort_keys=True).encode()])
        durable.fsync(temporary)
        may_commit()
        if final.exists():  # a run that fell back past a damaged one writes it anew
            durable.rename(final, root / f"{TEMPORARY}damaged-{final.name}")
        durable.rename(temporary, final)
        durable.fsync(root)
        durable.write_atomically(root / "latest", final.name + "\n")
        verify(final)
        trusted.add(step)
        clean(root)
        prune(root, step, retention, trusted)
        return b""

    try:
        for stage in (prepare, files, commit):
            answers = _together(stage, f"saving {final.name}", lambda cause: _unwritable(root, final, state, cause))
            if stage is prepare:  # rank 0's name for it
                temporary = temporary.with_name(f"{TEMPORARY}{final.name}-{answers[0].rstrip(bytes(1)).decode()}")
            elif stage is files:
                for rank, answer in enumerate(answers):
                    entry = {"bytes": int.from_bytes(answer[:8], "little"), "sha256": answer[8:40].hex()}
                    written[rank_file(rank)] = entry
    except BaseException:
        if main:
            with suppress(OSError):  # what was written of it may be what fills the disk
                durable.remove(temporary)
        raise


def _together(stage: Callable[[], bytes], what: str, explain: Callable[[Exception], UserError]) -> list[bytes]:
    """Run `stage` on every rank: the ranks' answers, or an error on all of them if one had one."""
    error: BaseException | None = None
    answer = b""
    try:
        answer = stage()
    except (OSError, InvalidCheckpoint) as cause:
        error = explain(cause)
    except BaseException as cause:
        error = cause
    answers = dist.gather_bytes(bytes([_verdict(error)]) + answer.ljust(40, b"\0"))
    if error is not None:
        raise error
    if worst := max(a[0] for a in answers):
        raise (DiskError if worst == 2 else UserError)(f"{what} failed on another rank; its message says why")
    return [a[1:] for a in answers]


def _verdict(error: BaseException | None) -> int:
    return 0 if error is None else 2 if isinstance(error, DiskError) else 1


def _unwritable(root: Path, final: Path, state: State, cause: BaseException) -> DiskError:
    if not root.parent.is_dir():
        return DiskError(f"checkpoint {final}: the run folder {root.parent} is gone; nothing more can be saved in it")
    return DiskError(
        f"checkpoint {final}: cannot be written: {cause}; it needs {state.nbytes / 1e6:.1f} MB and "
        f"{shutil.disk_usage(root.parent).free / 1e6:.1f} MB are free; earlier checkpoints are untouched, "
        "--resume goes on from the newest"
    )
