"""The DINO step in the peers' own code: lightly's parts as its example puts them together, and dino itself."""

import copy
import importlib
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.rows import Row, normalised


def part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries under `prefix.`, without it."""
    return {k.removeprefix(prefix + "."): v for k, v in state.items() if k.startswith(prefix + ".")}


class Lightly:
    """lightly's loss, head and EMA, a timm ViT, one forward a view: docs.lightly.ai, examples, DINO."""

    disclosures = (
        "lightly: its example's parts and order of calls, unpatched; the example's Adam is AdamW here, as in the "
        "paper; it does not clip gradients, so ours does not either in this comparison",
    )
    pos_interp = "timm"
    clips = False

    @staticmethod
    def prepare(path: str | None) -> None:
        """Everything that is imported, so that memory can be counted from there."""
        for name in ("timm", "lightly.loss", "lightly.models.modules", "lightly.models.utils"):
            importlib.import_module(name)

    def __init__(self, row: Row, state: dict[str, Tensor]) -> None:
        import timm
        from lightly.loss import DINOLoss
        from lightly.models.modules import DINOProjectionHead
        from lightly.models.utils import deactivate_requires_grad, update_momentum

        warnings.filterwarnings("ignore", category=FutureWarning)  # weight_norm's
        self.row = row
        self.update_momentum = update_momentum
        self.views = [*normalised(state["global"]), *normalised(state["local"])]
        self.student_backbone = timm.create_model(
            row.backbone, num_classes=0, in_chans=row.channels, dynamic_img_size=True, **row.backbone_options
        )
        self.student_backbone.load_state_dict(part(state, "backbone"))
        self.student_head = DINOProjectionHead(
            self.student_backbone.num_features, row.hidden_dim, row.bottleneck_dim, row.out_dim, freeze_last_layer=1
        )
        head = {k.replace("mlp.", "layers."): v for k, v in part(state, "head").items()}
        self.student_head.load_state_dict(head)
        self.teacher_backbone = copy.deepcopy(self.student_backbone)
        self.teacher_head = DINOProjectionHead(
            self.student_backbone.num_features, row.hidden_dim, row.bottleneck_dim, row.out_dim
        )
        self.teacher_head.load_state_dict(head)
        deactivate_requires_grad(self.teacher_backbone)
        deactivate_requires_grad(self.teacher_head)
        self.criterion = DINOLoss(
            row.out_dim, teacher_temp=row.teacher_temp, student_temp=row.student_temp, warmup_teacher_temp_epochs=1
        )
        parameters = [*self.student_backbone.parameters(), *self.student_head.parameters()]
        self.optimizer = torch.optim.AdamW(parameters, lr=row.lr, weight_decay=row.weight_decay)

    def _backward(self) -> Tensor:
        global_views = self.views[:2]
        with torch.autocast("cpu", torch.bfloat16, enabled=self.row.dtype == "bf16"):
            teacher_out = [self.teacher_head(self.teacher_backbone(v).flatten(start_dim=1)) for v in global_views]
            student_out = [self.student_head(self.student_backbone(v).flatten(start_dim=1)) for v in self.views]
            loss = self.criterion(teacher_out, student_out, epoch=1)
        loss.backward()
        return loss

    def step(self, count: int) -> None:
        """The body of the example's inner loop."""
        for _ in range(count):
            self.update_momentum(self.student_backbone, self.teacher_backbone, m=self.row.momentum)
            self.update_momentum(self.student_head, self.teacher_head, m=self.row.momentum)
            self._backward()
            self.student_head.cancel_last_layer_gradients(current_epoch=1)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def gradients(self) -> tuple[float, dict[str, Tensor]]:
        """Loss and gradients of the first step by canonical name."""
        loss = self._backward()
        named = [(f"backbone.{k}", p) for k, p in self.student_backbone.named_parameters()]
        named += [(f"head.{k.replace('layers.', 'mlp.')}", p) for k, p in self.student_head.named_parameters()]
        return loss.item(), {k: p.grad for k, p in named if p.grad is not None}


class _Constant:
    """A schedule of dino's: indexed by the iteration."""

    def __init__(self, value: float) -> None:
        self.value = value

    def __getitem__(self, iteration: int) -> float:
        return self.value


class _Module(nn.Module):
    """Stands where DistributedDataParallel does: `.module`, without its buckets."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, images: Any) -> Tensor:
        return self.module(images)


class Dino:
    """facebookresearch/dino at `path`, unmodified: `main_dino.train_one_epoch` itself is what is timed."""

    disclosures = (
        "dino: train_one_epoch of the clone is called as it is; on a machine without CUDA Tensor.cuda and "
        "torch.cuda.synchronize do nothing, and the final all-reduce of its log meters (device='cuda') is skipped",
        "dino: one process (gloo, world size 1), no DistributedDataParallel around the student: spares it the buckets",
        "dino: drop path 0 on both sides, so that gradients can be compared; in bf16 CPU autocast without a scaler",
    )
    pos_interp = "dino"
    clips = True

    @staticmethod
    def prepare(path: str | None) -> None:
        """Put the clone on the path and import it."""
        if path is None or not (Path(path) / "main_dino.py").is_file():
            raise FileNotFoundError(f"--peer dino={path}: no main_dino.py there; give a clone of facebookresearch/dino")
        sys.path.insert(0, str(Path(path).resolve()))
        warnings.filterwarnings("ignore", category=FutureWarning)
        importlib.import_module("main_dino")

    def __init__(self, row: Row, state: dict[str, Tensor]) -> None:
        import main_dino
        import utils
        import vision_transformer as vits

        assert row.dino_arch is not None
        if not torch.cuda.is_available():
            torch.Tensor.cuda = lambda self, *a, **k: self  # type: ignore[method-assign]
            torch.cuda.synchronize = lambda *a, **k: None
        utils.SmoothedValue.synchronize_between_processes = lambda self: None
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)

        self.main_dino, self.row = main_dino, row
        self.images = [*normalised(state["global"]), *normalised(state["local"])]

        def network() -> nn.Module:
            backbone = vits.__dict__[row.dino_arch](patch_size=16, drop_path_rate=0.0)
            head = vits.DINOHead(backbone.embed_dim, row.out_dim, use_bn=False, norm_last_layer=True)
            return utils.MultiCropWrapper(backbone, head)

        self.student, self.teacher = _Module(network()), network()
        weights = {k: v for k, v in state.items() if k not in ("global", "local")}
        self.student.module.load_state_dict(weights)
        self.teacher.load_state_dict(weights)
        self.teacher.requires_grad_(False)
        self.loss = main_dino.DINOLoss(row.out_dim, 2 + row.locals, row.teacher_temp, row.teacher_temp, 0, 100)
        self.optimizer = torch.optim.AdamW(utils.get_params_groups(self.student))

    def _epoch(self, count: int, lr: float, momentum: float, clip: float) -> dict[str, float]:
        arguments = type("Arguments", (), {"epochs": 100, "clip_grad": clip, "freeze_last_layer": 1})
        with torch.autocast("cpu", torch.bfloat16, enabled=self.row.dtype == "bf16"):
            return self.main_dino.train_one_epoch(
                self.student,
                self.teacher,
                self.teacher,
                self.loss,
                [(self.images, None)] * count,
                self.optimizer,
                _Constant(lr),
                _Constant(self.row.weight_decay),
                _Constant(momentum),
                1,  # epoch: the prototypes are frozen in epoch 0 only
                None,
                arguments,
            )

    def step(self, count: int) -> None:
        """An epoch of `count` iterations."""
        self._epoch(count, self.row.lr, self.row.momentum, clip=3.0)

    def gradients(self) -> tuple[float, dict[str, Tensor]]:
        """Loss and gradients that one iteration without clipping leaves behind, by canonical name."""
        loss = self._epoch(1, lr=0.0, momentum=1.0, clip=0.0)["loss"]
        return loss, {k: p.grad for k, p in self.student.module.named_parameters() if p.grad is not None}


PEERS: dict[str, type[Lightly] | type[Dino]] = {"lightly": Lightly, "dino": Dino}
