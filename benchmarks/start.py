"""Start of the program to the end of its first step: `selfsup train` and dino's main_dino, each in a fresh process.

Both processes stop where their program would write down the first step's figures; imports, reading the folder, building
student and teacher, starting two loader workers, and one step are in the time. The first losses do not have to
agree (other weights and crops), the number of trained parameters and of crops does.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from benchmarks import peers_dino, photographs, protocol
from benchmarks.case import Timed

WORKERS = 2


def inputs(options: dict[str, Any], folder: Path) -> None:
    """Photographs in class folders."""
    photographs.write(folder / "images", options["images"])


class Program(Timed):
    """Runs this file's main program with its own name."""

    name = ""
    elsewhere = True
    path: str | None = None

    @classmethod
    def imports(cls, path: str | None) -> None:
        cls.path = path

    def _once(self) -> dict[str, Any]:
        command = [sys.executable, "-P", "-m", "benchmarks.start", self.name, str(self.folder)]
        given = json.dumps({**self.options, "path": self.path, "threads": torch.get_num_threads()})
        done = subprocess.run(
            [*command, given], cwd=protocol.ROOT, capture_output=True, text=True, timeout=300, env=dict(os.environ)
        )
        if done.returncode:
            raise RuntimeError(f"{self.name} ended with {done.returncode}: {done.stderr[-1500:]}")
        return dict(json.loads(done.stdout.splitlines()[-1]))

    def run(self, count: int) -> None:
        for _ in range(count):
            self._once()

    def answer(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: torch.tensor(v, dtype=torch.float64) for k, v in self._once().items()}

    def flops(self) -> int:
        return 0


class Ours(Program):
    """selfsup train."""

    name = "ours"
    disclosures = (
        "start: files are in the page cache and compiled to bytecode; ours is the whole `selfsup train` command",
    )


class Dino(Program):
    """main_dino.py."""

    name = "dino"
    disclosures = (
        peers_dino.NO_NETWORK,
        peers_dino.NO_CUDA,
        "dino: main_dino.train_dino on a CPU: gloo for nccl, no device_ids in DistributedDataParallel, torch.cuda.set_device "
        "does nothing, --use_fp16 false, the final figures of an epoch are never reached",
    )


def differ(options: dict[str, Any], ours: dict[str, Tensor], peer: dict[str, Tensor]) -> str:
    """Crops, images and (within 1 %: dino keeps the prototypes' scale as a parameter) parameters."""
    for name in ("views", "batch"):
        if ours[name] != peer[name]:
            return f"{name}: ours {float(ours[name]):g}, dino's {float(peer[name]):g}"
    if not 0.99 < float(ours["parameters"] / peer["parameters"]) < 1.01:
        return f"parameters: ours {float(ours['parameters']):g}, dino's {float(peer['parameters']):g}"
    return "" if ours["loss"].isfinite() and peer["loss"].isfinite() else "a loss is not finite"


SIDES: dict[str, type[Timed]] = {"ours": Ours, "dino": Dino}


# --------------------------------------------------------------------------------------------- in the fresh processes


def leave(**found: float) -> NoReturn:
    """Say what was seen in the first step, and end."""
    print(json.dumps(found), flush=True)
    os._exit(0)


def run_ours(folder: Path, options: dict[str, Any]) -> None:
    """`selfsup train dino_vits16 ...` up to the first step's record."""
    from selfsup.cli import main

    out = folder / f"run-{os.getpid()}"
    sys.argv = [
        "selfsup", "train", "dino_vits16", f"data={folder / 'images'}", "backbone.name=vit_tiny_patch16_224",
        f"method.out_dim={options['out_dim']}", f"global_batch={options['batch']}", f"workers={WORKERS}", "device=cpu",
        "precision=fp32", f"threads={options['threads']}", "views.local.count=8", "--out", str(out),
    ]  # fmt: skip
    from selfsup import train as training

    original = training._loop

    def loop(run: Any, stream: Any, recorder: Any, *rest: Any) -> Any:
        def record(step: int, schedules: Any, parts: Any) -> None:
            trained = sum(p.numel() for p in run.method.student.parameters())
            leave(loss=float(parts["loss"]), parameters=trained, views=len(run.method.views()), batch=options["batch"])

        recorder.record = record
        return original(run, stream, recorder, *rest)

    training._loop = loop  # type: ignore[assignment]
    main()


def run_dino(folder: Path, options: dict[str, Any]) -> None:
    """main_dino.train_dino up to the first step's log."""
    port = 20_000 + os.getpid() % 20_000
    os.environ |= {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    main_dino: Any = peers_dino.load(options["path"], "main_dino")
    import argparse

    import utils

    torch.set_num_threads(options["threads"])
    half = []
    if not torch.cuda.is_available():
        peers_dino.without_cuda()
        torch.cuda.set_device = lambda device: None
        init, parallel = torch.distributed.init_process_group, torch.nn.parallel.DistributedDataParallel
        torch.distributed.init_process_group = lambda backend, **k: init("gloo", **k)
        torch.nn.parallel.DistributedDataParallel = lambda module, device_ids: parallel(module)  # type: ignore[assignment,misc]
        half = ["--use_fp16", "false"]
    students = []
    original = main_dino.train_one_epoch

    def epoch(student: Any, *rest: Any) -> Any:
        students.append(student)
        return original(student, *rest)

    def update(self: Any, loss: float = 0.0, **rest: float) -> None:
        trained = sum(p.numel() for p in students[0].parameters())
        leave(loss=loss, parameters=trained, views=10, batch=options["batch"])

    main_dino.train_one_epoch = epoch
    utils.MetricLogger.update = update
    parser = argparse.ArgumentParser("DINO", parents=[main_dino.get_args_parser()])
    main_dino.train_dino(
        parser.parse_args([
            "--arch", "vit_tiny", "--patch_size", "16", "--out_dim", str(options["out_dim"]),
            "--batch_size_per_gpu", str(options["batch"]), "--data_path", str(folder / "images"),
            "--output_dir", str(folder), "--num_workers", str(WORKERS), "--epochs", "11", *half,
        ])
    )  # fmt: skip


if __name__ == "__main__":
    {"ours": run_ours, "dino": run_dino}[sys.argv[1]](Path(sys.argv[2]), json.loads(sys.argv[3]))
