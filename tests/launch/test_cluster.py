"""Clusters as data: built-in files, overrides, Slurm's spellings, and refusals that name the key."""

from pathlib import Path

import pytest
import yaml

from selfsup.config import Config, dump
from selfsup.errors import UserError
from selfsup.launch.cluster import Cluster, cluster_names, load, split_overrides

FOLDER = Path(__file__).resolve().parents[2] / "launch" / "clusters"


def refusal(*overrides: str, name: str = "slurm") -> str:
    """The message of the refusal: at most two lines."""
    with pytest.raises(UserError) as caught:
        load(name, overrides)
    assert 0 < len(str(caught.value).splitlines()) <= 2
    return str(caught.value)


@pytest.mark.parametrize("name", cluster_names())
def test_built_in_clusters(name: str, tmp_path: Path):
    """They load by name and as a file, say what they are in their first line, and survive being written."""
    cluster = load(name)
    assert load(str(FOLDER / f"{name}.yaml")) == cluster
    assert (FOLDER / f"{name}.yaml").read_text().startswith("# ")
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump(cluster))
    assert load(str(copy)) == cluster
    assert cluster.kind == (name if name in ("local", "debug") else "slurm")


def test_which_are_built_in():
    assert cluster_names() == ["debug", "example_container", "example_gres", "local", "slurm"]


def test_nothing_of_a_site_is_a_default():
    """Every option of Slurm that a plain cluster writes is one that it was given."""
    cluster = Cluster()
    unset = (
        "partition",
        "account",
        "qos",
        "constraint",
        "time",
        "mem",
        "cpus_per_task",
        "gpu_type",
        "container",
        "python",
    )
    assert all(getattr(cluster, key) is None for key in unset)
    assert not cluster.env and not cluster.setup and not cluster.sbatch and not cluster.srun


def test_overrides(tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "partition: p\nenv: {A: 1, B: x y}\nsbatch: {exclude: n7, mail_type: END}\nsetup: module load cuda\n"
    )
    cluster = load(
        str(path), ["nodes=2", "env.B=z", "env.C=3", "sbatch.exclude=null", "sbatch.exclusive=true", "account=007"]
    )
    assert (cluster.partition, cluster.nodes, cluster.account) == ("p", 2, "007")
    assert cluster.env == {"A": "1", "B": "z", "C": "3"}
    assert cluster.sbatch == {"exclude": None, "mail-type": "END", "exclusive": True}
    assert cluster.setup == ("module load cuda",)


@pytest.mark.parametrize(
    ("time", "minutes"),
    [
        ("90", 90),
        ("90:00", 90),
        ("90:01", 91),
        ("24:00:00", 1440),
        ("01:30:00", 90),
        ("2-00:00:00", 2880),
        ("1-12", 2160),
        ("1-12:30", 2190),
        ("0-0:10:01", 11),
    ],
)
def test_time(time: str, minutes: int, tmp_path: Path):
    """As Slurm reads them (man sbatch), also where YAML would read 24:00:00 as a number in base 60."""
    assert load("slurm", [f"time={time}"]).time == minutes
    (tmp_path / "c.yaml").write_text(f"time: {time}\n")
    assert load(str(tmp_path / "c.yaml")).time == minutes


@pytest.mark.parametrize(
    ("overrides", "tasks", "world"),
    [
        ([], 1, 1),
        (["gpus_per_node=4", "nodes=2"], 4, 8),
        (["gpus_per_node=4", "tasks_per_node=2"], 2, 2),
        (["gpus_per_node=0"], 1, 1),
        (["gpus_per_node=0", "tasks_per_node=2", "nodes=2"], 2, 4),
        (["gpus_per_node=8", "gpu_request=none"], 8, 8),
    ],
)
def test_ranks(overrides: list[str], tasks: int, world: int):
    cluster = load("slurm", overrides)
    assert (cluster.tasks, cluster.world_size) == (tasks, world)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("partion=x", "unknown key 'partion'; did you mean partition?"),
        ("requeue.crashs=3", "did you mean requeue.crashes?"),
        ("nodes=0", "nodes=0"),
        ("nodes=two", "nodes='two'"),
        ("mem=64", "mem=64: memory of a node with its unit, as in 64G"),
        ("time=soon", "time='soon': a time limit in minutes, or like 12:00:00"),
        ("gpu_request=grs", "'gpus-per-node', 'gres' or 'none'"),
        ("gpu_type=", "gpu_type="),
        ("env.A-B=3", "'A-B' is no name of an environment variable"),
        ("env.A=[1]", "env.A=[1]"),
        ("sbatch.nice=[1]", "sbatch.nice=[1]"),
        ("sbatch.nodes=3", "sbatch.nodes: use the key nodes"),
        ("sbatch.ntasks_per_node=3", "use the key tasks_per_node"),
        ("sbatch.signal=USR1@3", "use the key signal_before_s"),
        ("sbatch.output=x", "logs are kept in the run folder"),
        ("srun.error=x", "logs are kept in the run folder"),
        ("sbatch.-J=x", "is no long option"),
        ('partition="a\\nb"', "one line of text"),
        ('setup=["a\\nb"]', "one line of text"),
        ('sbatch={comment: "a\\nb"}', "one line of text"),
        ("signal_before_s=100000", "signal_before_s=100000"),
        ("requeue.timeouts=-1", "requeue.timeouts=-1"),
        ("kind=pbs", "'slurm', 'local' or 'debug'"),
        ("ports=29500", "ports=29500: "),
        ("ports=80-90", "ports='80-90': a range of at least 4 ports within 1024-65535, as in 29500-29600"),
        ("ports=29500-29502", "at least 4 ports"),
        ("ports=65533-65536", "at least 4 ports"),
        ("ports=29600-29500", "at least 4 ports"),
        ("evaluation=3", "evaluation=3"),
        ("evaluation.tme=5", "evaluation: unknown key 'evaluation.tme'; did you mean evaluation.time?"),
        ("evaluation.mem=5", "evaluation.mem=5: memory of a node"),
        ("evaluation.kind=local", "evaluation.kind: cannot differ"),
        ("evaluation.evaluation={}", "evaluation.evaluation: cannot differ"),
        ("evaluation.time=5", "signal_before_s=300 is not within time=5"),
    ],
)
def test_refusals(override: str, expected: str):
    assert expected in refusal(override)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["time=5", "signal_before_s=300"], "signal_before_s=300 is not within time=5 (minutes)"),
        (["gpu_type=a100", "gpu_request=none"], "gpu_type='a100'"),
        (["gpu_type=a100", "gpus_per_node=0"], "gpu_type='a100'"),
        (["kind=local", "nodes=2"], "this machine alone"),
        (["kind=debug", "account=p"], "account: only for kind: slurm"),
        (["kind=local", "partition=p", "mem=1G", "srun.mpi=none"], "partition, mem, srun: only for kind: slurm"),
    ],
)
def test_refusals_of_combinations(overrides: list[str], expected: str):
    assert expected in refusal(*overrides)


def test_evaluation_takes_little_unless_told_otherwise():
    """One task on one node and one GPU; the rest, also the options of sbatch, as the training."""
    training = ["nodes=4", "gpus_per_node=8", "gpu_type=a100", "array_parallelism=3", "account=a", "sbatch.nice=5"]
    small = load("slurm", training).for_evaluation()
    assert (small.nodes, small.tasks, small.gpus_per_node, small.gpu_type) == (1, 1, 1, "a100")
    assert (small.array_parallelism, small.account, small.sbatch) == (3, "a", {"nice": 5})
    assert load("slurm", ["gpus_per_node=0", "tasks_per_node=4"]).for_evaluation().world_size == 1
    given = ["evaluation.time=0:30:00", "evaluation.partition=cpu", "evaluation.gpus_per_node=0", "evaluation.mem=8G"]
    given += ["evaluation.sbatch={nice: 7, exclude: n7}", "evaluation.env.A=1", "env.B=2"]
    cluster = load("slurm", [*training, *given])
    other = cluster.for_evaluation()
    assert (other.time, other.partition, other.gpus_per_node, other.gpu_type, other.mem) == (30, "cpu", 0, None, "8G")
    assert other.sbatch == {"nice": 7, "exclude": "n7"} and other.env == {"A": "1", "B": "2"}
    assert (cluster.time, cluster.gpus_per_node, cluster.evaluation["partition"]) == (1440, 8, "cpu")
    assert other.for_evaluation().gpus_per_node == 0 and not other.evaluation


@pytest.mark.parametrize("ports", ["1024-1027", "29500-29600", "65532-65535"])
def test_ports(ports: str):
    assert load("slurm", [f"ports={ports}"]).ports == ports


def test_unknown_clusters(tmp_path: Path):
    assert "no cluster 'slrm'; did you mean slurm?" in refusal(name="slrm")
    assert "cluster nowhere.yaml: cannot be read" in refusal(name="nowhere.yaml")
    path = tmp_path / "c.yaml"
    for text, expected in {
        "- 1\n": "expected 'key: value'",
        "a: [": "not valid YAML",
        "nodes: 1\nnodes: 2": "twice",
    }.items():
        path.write_text(text)
        assert expected in refusal(name=str(path))


def test_overrides_are_told_apart():
    assert split_overrides(["nodes=2", "seed=1", "env.X=1", "optimizer.lr=1", "data=/d", "time=1:00"]) == (
        ["nodes=2", "env.X=1", "time=1:00"],
        ["seed=1", "optimizer.lr=1", "data=/d"],
    )
    assert not set(Cluster.model_fields) & set(Config.model_fields), "a key of both could not be told apart"
    for item, hint in {"ndes=2": "nodes", "stps=2": "steps"}.items():
        with pytest.raises(UserError, match=f"did you mean {hint}"):
            split_overrides([item])


def test_what_is_written_is_plain_yaml():
    """The resolved cluster in a run folder."""
    assert yaml.safe_load(dump(load("slurm", ["time=24:00:00"])))["time"] == 1440
