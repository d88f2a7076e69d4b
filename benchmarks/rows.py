"""What is measured: one DINO step in a few sizes, and the weights and crops that every side starts from."""

import itertools
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from selfsup.config import BackboneConfig, Config


@dataclass(frozen=True)
class Row:
    """One DINO step: student and teacher forward, loss, backward, clipping, optimizer, teacher's EMA."""

    name: str
    title: str
    peers: tuple[str, ...]
    backbone: str
    backbone_options: dict[str, Any] = field(default_factory=dict)
    dino_arch: str | None = None
    """The same backbone in dino's code."""
    dtype: str = "fp32"
    """fp32, or bf16: autocast with fp32 master weights."""
    channels: int = 3
    batch: int = 8
    global_size: int = 224
    local_size: int = 96
    locals: int = 8
    out_dim: int = 65536
    hidden_dim: int = 2048
    bottleneck_dim: int = 256
    lr: float = 1e-5
    weight_decay: float = 0.04
    momentum: float = 0.996
    teacher_temp: float = 0.04
    student_temp: float = 0.1

    def to_dict(self) -> dict[str, Any]:
        """As JSON for a worker."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Row":
        """From `to_dict`."""
        return cls(**{**values, "peers": tuple(values["peers"])})


STEP = Row(
    name="step",
    title="DINO step, ViT-S/16, 2x224 + 8x96, K = 65,536, batch 8, fp32",
    peers=("lightly", "dino"),
    backbone="vit_small_patch16_224",
    dino_arch="vit_small",
)
ROWS = [
    STEP,
    replace(STEP, name="step-bf16", title=STEP.title.replace("fp32", "bf16 autocast"), dtype="bf16"),
    Row(
        name="small",
        title="DINO step, ViT-Ti/4, 2x28 + 6x16 grey, K = 4,096, batch 32, fp32",
        peers=("lightly",),
        backbone="vit_tiny_patch16_224",
        backbone_options={"img_size": 28, "patch_size": 4},
        channels=1,
        batch=32,
        global_size=28,
        local_size=16,
        locals=6,
        out_dim=4096,
        hidden_dim=512,
        bottleneck_dim=128,
    ),
]


def normalised(crops: Tensor) -> Tensor:
    """uint8 [V, B, C, S, S] -> float32, as selfsup's default mean and std for this number of channels have it."""
    config = Config(backbone=BackboneConfig(in_chans=crops.shape[2]))
    mean, std = (torch.tensor(x).view(-1, 1, 1) for x in (config.mean, config.std))
    return (crops.float() / 255 - mean) / std


def initial_state(row: Row, seed: int = 0) -> dict[str, Tensor]:
    """Weights and crops: `backbone.<timm key>`, `head.<key as in dino's checkpoints>`, `global`, `local`.

    global [2, B, C, S, S] and local [L, B, C, s, s] are uint8 noise. The teacher starts from the student's weights,
    the centre from zero.
    """
    import timm

    torch.manual_seed(seed)
    model: Any = timm.create_model(row.backbone, num_classes=0, in_chans=row.channels, **row.backbone_options)
    state = {f"backbone.{k}": v.detach().contiguous().clone() for k, v in model.state_dict().items()}
    dims: list[int] = [int(model.num_features), row.hidden_dim, row.hidden_dim, row.bottleneck_dim]
    for layer, (a, b) in enumerate(itertools.pairwise(dims)):
        state[f"head.mlp.{2 * layer}.weight"] = torch.randn(b, a) * a**-0.5
        state[f"head.mlp.{2 * layer}.bias"] = torch.randn(b) * 0.02
    state["head.last_layer.weight_v"] = torch.randn(row.out_dim, row.bottleneck_dim)
    state["head.last_layer.weight_g"] = torch.ones(row.out_dim, 1)
    for name, count, size in (("global", 2, row.global_size), ("local", row.locals, row.local_size)):
        state[name] = torch.randint(0, 256, (count, row.batch, row.channels, size, size), dtype=torch.uint8)
    return state


def write_initial_state(row: Row, path: Path) -> None:
    """`initial_state` as a safetensors file."""
    save_file(initial_state(row), path)
