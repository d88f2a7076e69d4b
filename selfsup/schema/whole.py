"""The configuration of a run, of all its sections."""

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from selfsup.schema.data import DataConfig, MixConfig
from selfsup.schema.kinds import Positive, Section, Shortcut, expand_short_forms
from selfsup.schema.together import faults
from selfsup.schema.training import (
    BackboneConfig,
    CheckpointConfig,
    EarlyStopConfig,
    EvalConfig,
    InitConfig,
    MethodConfig,
    OptimizerConfig,
    SpikeConfig,
    TeacherConfig,
)
from selfsup.schema.views import ViewsConfig


class Config(Section):
    """Everything a training run depends on."""

    data: DataConfig = DataConfig()
    views: ViewsConfig = ViewsConfig()
    backbone: BackboneConfig = BackboneConfig()
    method: MethodConfig = MethodConfig()
    teacher: TeacherConfig = TeacherConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mix: MixConfig = MixConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    init_from: InitConfig = InitConfig()
    spike: SpikeConfig = SpikeConfig()
    early_stop: EarlyStopConfig = EarlyStopConfig()

    steps: Positive | None = None
    epochs: Annotated[float, Field(gt=0, le=1e9)] | None = None
    samples: Positive | None = None
    global_batch: Positive = 64
    accumulate: Positive = 1
    """Micro-batches per step on every rank."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    precision: Literal["auto", "bf16", "fp16", "fp32", "fp64"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    deterministic: bool | None = None
    """Bitwise repeatable kernels; null: yes on a CPU, no on CUDA."""
    parallel: Literal["ddp"] = "ddp"
    compile: bool = False
    grad_checkpointing: bool = False
    shortcuts: tuple[Shortcut, ...] = get_args(Shortcut)
    """Ways to the same numbers, up to the order of sums, in less time and memory; [] computes everything as it is written
    in the papers. packed: plain ViTs take crops of all sizes through their linear layers at once, and keep less for the
    backward pass; cls: their last block computes CLS alone where only CLS is used (with packed); prototypes: the loss over
    prototypes in one function with a gradient of its own; heap: on a CPU memory that a step frees is kept for the next."""
    workers: Annotated[int, Field(ge=0)] = 2
    threads: Positive | None = None
    """Compute threads a process; null: this machine's CPUs shared among its ranks."""
    log_every: Positive = 10
    tensorboard: bool = True
    """Also write TensorBoard files, if that package is installed."""
    pictures: bool = True
    """Draw RUN/pictures/augmentations.png: the first images of the first step, as the network sees them."""
    report: bool = True
    """The command writes RUN/report.html when training is done; `selfsup report RUN` writes it at any time."""
    stop_at: Positive | None = None
    """End early at this step with exit code 75; schedules are left alone."""
    profile: bool = False
    """Write RUN/profile: a table of where a step goes, and a trace of two steps."""
    max_nonfinite: Positive = 10
    """Stop after so many steps in a row whose loss or gradients are not finite."""
    hang_timeout: Annotated[float, Field(ge=1, le=10_000_000)] = 1800
    """Seconds without progress after which a run reports who hangs, and ends; also how long ranks wait for one another."""

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, values: Any) -> Any:
        return expand_short_forms(values) if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _check(self) -> "Config":
        for fault in faults(self):
            raise ValueError(fault)
        return self

    @property
    def volumes(self) -> bool:
        """Whether data are volumes: the backbone says it."""
        return self.backbone.name.startswith("vit3d")

    @property
    def mean(self) -> tuple[float, ...]:
        """Channel means of values in [0, 1]."""
        return self.data.mean or (
            (0.485, 0.456, 0.406) if self.backbone.in_chans == 3 else (0.5,) * self.backbone.in_chans
        )

    @property
    def std(self) -> tuple[float, ...]:
        """Channel standard deviations of values in [0, 1]."""
        return self.data.std or (
            (0.229, 0.224, 0.225) if self.backbone.in_chans == 3 else (0.25,) * self.backbone.in_chans
        )
