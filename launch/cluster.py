"""What is particular to a cluster, as data: a `Cluster` from a YAML file, `clusters/NAME.yaml` here or one of the user's.

Nothing of a site is in code. Whatever sbatch and srun know and this schema does not goes into `sbatch` and `srun`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from selfsup import config
from selfsup.config import Config, Positive, Section
from selfsup.errors import UserError

_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<first>\d+)(?::(?P<second>\d+))?(?::(?P<third>\d+))?")

OWN = {
    "cpus-per-task": "cpus_per_task",
    "gpus-per-node": "gpus_per_node",
    "nodes": "nodes",
    "ntasks-per-node": "tasks_per_node",
    "signal": "signal_before_s",
    "array": "array_parallelism",
    "requeue": "requeue",
    "no-requeue": "requeue",
}
"""Options of sbatch that have a key of their own, which the code relies on."""
LOGS = ("output", "error", "open-mode")
"""Options of sbatch and srun that say where logs go: into the run folder."""


def _text(value: Any) -> Any:
    """A number where a word is wanted, as YAML reads `account: 1234`, is that word."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _one_line(value: str) -> str:
    if not value or not value.isprintable():
        raise ValueError("expected one line of text, without control characters")
    return value


def _minutes(value: Any) -> Any:
    """Slurm's spellings of a time limit in minutes; a number is minutes."""
    if not isinstance(value, str):
        return value
    if not (match := _TIME.fullmatch(value)):
        raise ValueError("a time limit in minutes, or like 12:00:00 and 2-00:00:00")
    days, (first, *rest) = match["days"], [int(x) for x in match.group("first", "second", "third") if x is not None]
    if days is not None:  # D-HH[:MM[:SS]]
        hours, minutes, seconds = [first, *rest, 0, 0][:3]
    else:  # MM, MM:SS, HH:MM:SS
        hours, minutes, seconds = [0, first, 0] if not rest else [0, first, *rest] if len(rest) == 1 else [first, *rest]
    return int(days or 0) * 1440 + hours * 60 + minutes + (seconds > 0)


def _memory(value: str) -> str:
    if not re.fullmatch(r"0|\d+[KMGT]", value):
        raise ValueError("memory of a node with its unit, as in 64G or 500000M; 0 for all of it")
    return value


def _lines(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


def _variables(values: dict[str, str]) -> dict[str, str]:
    for name in values:
        if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
            raise ValueError(f"{name!r} is no name of an environment variable")
    return values


def _options(values: dict[str, Any]) -> dict[str, Any]:
    """Names as sbatch and srun spell them: `mail_type` and `--mail-type` are `mail-type`."""
    out: dict[str, Any] = {}
    for name, value in values.items():
        plain = name.removeprefix("--").replace("_", "-")
        if not re.fullmatch(r"[a-z][a-z0-9-]+", plain):
            raise ValueError(f"{name!r} is no long option; write mail-type: END for --mail-type=END")
        if plain in LOGS:
            raise ValueError(f"{name!r}: logs are kept in the run folder")
        if isinstance(value, str):
            _one_line(value)
        out[plain] = value
    return out


def _ports(value: str) -> str:
    match = re.fullmatch(r"(\d{1,5})-(\d{1,5})", value)
    if not match or not 1024 <= int(match[1]) <= int(match[2]) - 3 <= 65535 - 3:
        raise ValueError("a range of at least 4 ports within 1024-65535, as in 29500-29600")
    return value


Line = Annotated[str, BeforeValidator(_text), AfterValidator(_one_line)]
Option = bool | int | str | None
Options = Annotated[dict[str, Option], AfterValidator(_options)]


class RequeuePolicy(Section):
    """When a job that did not finish is started again. Preemption and lost nodes are never counted."""

    timeouts: Annotated[int, Field(ge=0)] | None = None
    """How often after reaching the time limit; null: as often as it takes."""
    crashes: Annotated[int, Field(ge=0)] = 3
    """How often, without progress in between, after an error that is not the user's (exit code 2 is), or after any other end."""
    delay_s: Annotated[float, Field(ge=0)] = 30
    """Pause before the first restart after a crash; twice as long before each further one,"""
    max_delay_s: Annotated[float, Field(ge=0)] = 1800
    """but never longer than this."""


class Cluster(Section):
    """Where jobs run, what one asks for, and how often it is started again."""

    kind: Literal["slurm", "local", "debug"] = "slurm"
    """`local`: in the background on this machine; `debug`: here, in this terminal."""

    partition: Line | None = None
    account: Line | None = None
    qos: Line | None = None
    constraint: Line | None = None
    time: Annotated[Positive | None, BeforeValidator(_minutes)] = None
    """Limit of one job, in minutes or as Slurm writes it (12:00:00, 2-00:00:00); null: the partition's own."""

    nodes: Positive = 1
    tasks_per_node: Positive | None = None
    """Ranks; null: one a GPU, and one if there is none."""
    gpus_per_node: Annotated[int, Field(ge=0)] = 0
    gpu_request: Literal["gpus-per-node", "gres", "none"] = "gpus-per-node"
    """How GPUs are asked for: --gpus-per-node=4, --gres=gpu:4, or not at all (they come with the node)."""
    gpu_type: Line | None = None
    """As in --gres=gpu:TYPE:4."""
    cpus_per_task: Positive | None = None
    """A rank's own thread and its loader workers; null: what the partition gives."""
    mem: Annotated[Line, AfterValidator(_memory)] | None = None
    """Of a node, as in 64G; null: what the partition gives."""
    array_parallelism: Positive | None = None
    """Runs of a sweep at a time; null: 16, and on this machine one."""

    container: Line | None = None
    """Shell words before the command of every task, as in `apptainer exec --nv image.sif`."""
    python: Line | None = None
    """The interpreter there; null: this one."""
    host_python: Line | None = None
    """Outside the container, any Python 3, for the script that asks Slurm for a requeue; null: `python3`, or this one."""
    setup: Annotated[tuple[Line, ...], BeforeValidator(_lines)] = ()
    """Shell lines before the tasks start, as in `module load cuda`."""
    env: Annotated[dict[str, Line], AfterValidator(_variables)] = Field(default_factory=dict)
    """Environment variables, exported as they are written here, before `setup`."""
    sbatch: Options = Field(default_factory=dict)
    """Further options: `exclusive: true` is --exclusive, `mail-type: END` is --mail-type=END; null leaves one out."""
    srun: Options = Field(default_factory=dict)

    ports: Annotated[Line, AfterValidator(_ports)] | None = None
    """Of which a job takes one for its ranks to meet, as in 29500-29600; null: 20000-31999."""
    evaluation: dict[str, Any] = Field(default_factory=dict)
    """Keys that differ for the jobs that evaluate, which otherwise take one task on one node, and one GPU if there are any."""

    signal_before_s: Annotated[int, Field(ge=10, le=65535)] = 300
    """Seconds before the limit at which a job is told to save and go. Slurm may tell it a minute early."""
    requeue: RequeuePolicy = RequeuePolicy()

    @model_validator(mode="after")
    def _check(self) -> "Cluster":
        for name in self.sbatch.keys() & OWN.keys():
            raise ValueError(f"sbatch.{name}: use the key {OWN[name]}")
        if self.time is not None and self.signal_before_s >= self.time * 60:
            raise ValueError(f"signal_before_s={self.signal_before_s} is not within time={self.time} (minutes)")
        if self.gpu_type and (self.gpu_request == "none" or not self.gpus_per_node):
            raise ValueError(f"gpu_type={self.gpu_type!r}, but gpus_per_node and gpu_request ask for none")
        if self.kind != "slurm":
            if self.nodes > 1:
                raise ValueError(f"nodes={self.nodes}: kind: {self.kind} is this machine alone")
            foreign = ("partition", "account", "qos", "constraint", "gpu_type", "mem", "sbatch", "srun")
            if given := [key for key in foreign if getattr(self, key)]:
                raise ValueError(f"{', '.join(given)}: only for kind: slurm")
        if self.evaluation:
            try:
                self.for_evaluation()
            except UserError as error:
                raise ValueError(str(error)) from None
        return self

    def for_evaluation(self) -> "Cluster":
        """What an evaluation asks for, after the training or beside it. Raises UserError."""
        given = self.evaluation
        for key in ("kind", "evaluation"):
            if key in given:
                raise UserError(f"evaluation.{key}: cannot differ for evaluations")
        values = self.model_dump(exclude={"evaluation"})
        values |= {"nodes": 1, "tasks_per_node": 1, "gpus_per_node": min(1, self.gpus_per_node)}
        if given.get("gpus_per_node") == 0:
            values["gpu_type"] = None
        return config.validate(Cluster, config.merge(values, given), where="evaluation", prefix="evaluation.")

    @property
    def tasks(self) -> int:
        """Ranks on a node."""
        return self.tasks_per_node or max(1, self.gpus_per_node)

    @property
    def world_size(self) -> int:
        """Ranks of a job."""
        return self.nodes * self.tasks


def cluster_names() -> list[str]:
    """Names of the built-in clusters."""
    return config.file_names(resources.files(__package__) / "clusters")


def load(name: str, overrides: Iterable[str] = ()) -> Cluster:
    """A built-in cluster by name, or a YAML file, with overrides as in nodes=2 env.NCCL_DEBUG=INFO. Raises UserError."""
    values = config.read_named("cluster", name, resources.files(__package__) / "clusters")
    over = config.parse_overrides(overrides, short={})
    return config.validate(Cluster, config.merge(values, over), where=f"cluster {name}")


def split_overrides(overrides: Iterable[str]) -> tuple[list[str], list[str]]:
    """(those of a cluster, those of a recipe). A key that neither has is a UserError with the nearest of both."""
    ours: list[str] = []
    others: list[str] = []
    known: Mapping[str, Sequence[str]] = {"cluster": [*Cluster.model_fields], "recipe": [*Config.model_fields]}
    for item in overrides:
        key, equals, _ = item.partition("=")
        first = key.split(".")[0]
        if equals and first not in known["cluster"] and first not in known["recipe"]:
            hint = config.suggest(first, [*known["cluster"], *known["recipe"]])
            raise UserError(f"override {item!r}: neither a recipe nor a cluster has a key {first!r}{hint}")
        (ours if first in known["cluster"] else others).append(item)
    return ours, others
