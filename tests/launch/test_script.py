"""The sbatch script: what is shown is what is submitted, and a real Slurm takes it and does what it says."""

from collections.abc import Iterable
from pathlib import Path

import pytest

from selfsup.errors import UserError
from selfsup.launch.cluster import load
from selfsup.launch.script import Sbatch, foreign_variables
from tests.slurm.cluster import Slurm

HERE = ("partition=low", "time=20", "gpus_per_node=0", "cpus_per_task=1")
"""What the test cluster has."""


def script_of(overrides: Iterable[str], folder: Path, command: str = "true", name: str = "selfsup") -> str:
    """For the cluster `slurm` with these overrides."""
    return Sbatch(load("slurm", overrides), folder, command, name=name).text()


def lines(*overrides: str) -> list[str]:
    """Of such a script; the last is srun's."""
    return script_of(overrides, Path("/runs/a")).splitlines()


def test_options():
    script = lines("partition=p", "account=a", "qos=q", "constraint=x|y", "nodes=2", "mem=64G", "time=1-00:00:00")
    expected = "partition=p account=a qos=q constraint='x|y' nodes=2 mem=64G time=1440 signal=USR2@300 requeue"
    for option in (*expected.split(), "gpus-per-node=1", "ntasks-per-node=1", "cpus-per-task=8", "open-mode=append"):
        assert f"#SBATCH --{option}" in script
    assert not [line for line in script if "wckey" in line]
    assert script[-1].startswith("srun ") and " --cpus-per-task=8 --kill-on-bad-exit=1 true" in script[-1]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["gpus_per_node=4"], ["#SBATCH --gpus-per-node=4"]),
        (["gpus_per_node=4", "gpu_type=a100"], ["#SBATCH --gpus-per-node=a100:4"]),
        (["gpus_per_node=4", "gpu_request=gres"], ["#SBATCH --gres=gpu:4"]),
        (["gpus_per_node=4", "gpu_type=a100", "gpu_request=gres"], ["#SBATCH --gres=gpu:a100:4"]),
        (["gpus_per_node=4", "gpu_request=none"], []),
        (["gpus_per_node=0"], []),
        (["gpus_per_node=0", "sbatch.gpus=3"], ["#SBATCH --gpus=3"]),
    ],
)
def test_gpus(overrides: list[str], expected: list[str]):
    assert [line for line in lines(*overrides) if line.startswith("#SBATCH") and "gpu" in line] == expected


def test_any_option_can_be_given_or_left_out():
    """Also those that submitit knows by another spelling, once each."""
    given = [
        "sbatch.exclusive=true",
        "sbatch.mail-type=END",
        "sbatch.switches=1",
        "sbatch.partition=other",
        "sbatch.time=null",
    ]
    script = lines("partition=p", *given, "sbatch.nice=false", "srun.kill-on-bad-exit=null", "srun.mpi=none")
    assert {"#SBATCH --exclusive", "#SBATCH --mail-type=END", "#SBATCH --switches=1"} <= set(script)
    assert [line for line in script if "partition" in line] == ["#SBATCH --partition=other"]
    assert not [line for line in script if line.startswith(("#SBATCH --time", "#SBATCH --nice"))]
    assert "--kill-on-bad-exit" not in script[-1] and "--mpi=none true" in script[-1]


def test_environment_setup_and_container():
    script = lines("env.A='b c $HOME'", "setup=[module purge, module load cuda]", "container=apptainer exec x.sif")
    at = [script.index(x) for x in ("export A='b c $HOME'", "module purge", "module load cuda")]
    assert at == sorted(at) and at[-1] < len(script) - 1
    assert script[-1].endswith(" apptainer exec x.sif true")


def test_without_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A script can be read on a machine that has no Slurm; submitting there says so."""
    monkeypatch.setenv("PATH", "/nowhere")
    job = Sbatch(load("slurm"), tmp_path / "x", "true", name="x")
    assert "#SBATCH --nodes=1" in job.text()
    with pytest.raises(UserError, match="sbatch is not found"):
        job.launch()
    assert not (tmp_path / "x").exists(), "reading a script writes nothing"


@pytest.mark.parametrize("name", ["a%j", "a'b", 'a"b', "a\\b", "a\nb"])
def test_folders_that_slurm_would_misread(name: str, tmp_path: Path):
    with pytest.raises(UserError, match="Slurm takes"):
        script_of([], tmp_path / name)


def test_what_a_job_must_not_inherit():
    job = "SLURM_CONF SLURM_JOB_ID SLURM_RESTART_COUNT RANK CUDA_VISIBLE_DEVICES SUBMITIT_EXECUTOR SELFSUP_JOB"
    person = "PATH HOME SBATCH_ACCOUNT SBATCH_TIMELIMIT SBATCH_PARTITION SBATCH_SIGNAL SBATCH_QOS SBATCH_CORE_SPEC"
    environ = dict.fromkeys([*job.split(), *person.split()], "x")
    expected = "CUDA_VISIBLE_DEVICES RANK SBATCH_CORE_SPEC SBATCH_PARTITION SBATCH_SIGNAL SBATCH_TIMELIMIT SELFSUP_JOB"
    expected += " SLURM_JOB_ID SLURM_RESTART_COUNT"
    written = {"partition": "p", "time": 3, "account": None, "additional_parameters": {"core-spec": 1}}
    found = foreign_variables(environ, written)
    assert found == [*expected.split(), "SUBMITIT_EXECUTOR"]


# -------------------------------------------------------------------------------------------------- on a real Slurm


@pytest.fixture
def here(slurm: Slurm, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    """This process submits to the test cluster."""
    monkeypatch.setenv("SLURM_CONF", str(slurm.conf))
    return slurm


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a space, and letters that are not ASCII."""
    return tmp_path / "mein Lauf: größer, 走る & $HOME (#1)"


def test_slurm_accepts_the_scripts(here: Slurm, folder: Path):
    """sbatch --test-only, for every spelling; it is no formality: it refuses what the cluster does not have."""
    for overrides in (
        [],
        ["nodes=2", "tasks_per_node=2", "mem=1G"],
        ["gpus_per_node=2", "gpu_request=gres", "env.A=b c"],
        ["gpus_per_node=2", "sbatch.exclusive=true", "sbatch.comment=a 'b' c", "sbatch.exclude=n2"],
        ["srun.mpi=none", "setup=[echo a, ulimit -n 1024]"],
    ):
        script = script_of([*HERE, *overrides], folder, name="a b")
        status, _, err = here.try_command("sbatch", "--test-only", stdin=script)
        assert status == 0, f"{overrides}: {err}\n{script}"
    for overrides in (["partition=nowhere"], ["nodes=3"], ["gpus_per_node=3"], ["sbatch.nosuch=1"]):
        script = script_of([*HERE, *overrides], folder)
        assert here.try_command("sbatch", "--test-only", stdin=script)[0] != 0, script


SHOW = """
step=$(scontrol show step $SLURM_JOB_ID.$SLURM_STEP_ID | grep -wo 'CPUs=[0-9]*')
echo $SLURM_PROCID/$SLURM_NTASKS $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES $step $A $B
"""


@pytest.mark.parametrize("request_", ["gpus-per-node", "gres"])
def test_what_is_shown_is_submitted_and_runs(here: Slurm, folder: Path, tmp_path: Path, request_: str):
    (tmp_path / "show.sh").write_text(SHOW)
    asked = ["nodes=2", "tasks_per_node=2", "cpus_per_task=3", "gpus_per_node=2", f"gpu_request={request_}"]
    cluster = load("slurm", [*HERE, *asked, "env.A='x  \"$HOME'", "setup=export B=$(echo b)"])
    job = Sbatch(cluster, folder, f"sh {tmp_path}/show.sh", name="show me", after=["echo code $?"])
    shown = job.text()
    number = job.launch()
    assert (folder / f"{number}_submission.sh").read_text() == shown
    assert here.wait(number, "COMPLETED")["JobName"] == "show me"
    logs = [(folder / f"{number}_{rank}_log.out").read_text() for rank in range(4)]
    assert logs == [f'{rank}/4 n{rank // 2 + 1} 0,1 CPUs=12 x "$HOME b\n' for rank in range(4)]
    assert (folder / f"{number}_log.out").read_text().endswith("code 0\n")
    assert here.job(number)["NumCPUs"] == "12"


def test_logs_go_on_after_a_requeue(here: Slurm, folder: Path):
    command = "sh -c 'echo begun $SLURM_RESTART_COUNT; exec sleep 600'"
    number = Sbatch(load("slurm", [*HERE, "nodes=2"]), folder, command, name="x").launch()
    logs = [folder / f"{number}_{rank}_log.out" for rank in range(2)]

    def begun(times: int) -> bool:
        return all(log.exists() and log.read_text().count("begun") == times for log in logs)

    here.poll(lambda: begun(1), 60, "it does not start")
    here.command("scontrol", "requeue", number)
    here.poll(lambda: begun(2), 90, "it does not start again")
    said = [[line for line in log.read_text().splitlines() if "begun" in line] for log in logs]
    assert said == [["begun", "begun 1"]] * 2


def test_ranks_do_not_outlive_one_that_was_killed(here: Slurm, folder: Path):
    command = "sh -c 'echo up; [ $SLURM_PROCID = 3 ] && kill -9 $$; exec sleep 600'"
    number = Sbatch(load("slurm", [*HERE, "nodes=2", "tasks_per_node=2"]), folder, command, name="x").launch()
    assert here.wait(number, "FAILED")["ExitCode"] != "0:0"
    assert "tasks 0-1: Terminated" in (folder / f"{number}_log.out").read_text()


def test_what_follows_srun_survives_the_signals_of_a_job(here: Slurm, folder: Path):
    """It is run, with the tasks' exit code, after signals to the whole job, and although `setup` chose set -e."""
    command = "sh -c 'trap \"exit 75\" TERM; echo up; echo aside >&2; while :; do sleep 0.1; done'"
    cluster = load("slurm", [*HERE, "setup=[set -e, echo set up]"])
    after = ["code=$?", "echo ended with $code", "exit 3"]
    number = Sbatch(cluster, folder, command, name="x", after=after).launch()
    rank, batch = folder / f"{number}_0_log.out", folder / f"{number}_log.out"
    here.poll(lambda: rank.exists() and "aside" in rank.read_text(), 60, "it does not start")
    for name in ("USR1", "USR2", "TERM"):
        here.command("scancel", "--batch", f"--signal={name}", number)
    here.command("scancel", "--signal=TERM", number)  # that of the tasks
    assert here.wait(number, "FAILED")["ExitCode"] == "3:0"
    assert "set up\n" in batch.read_text() and "ended with 75\n" in batch.read_text()
    assert rank.read_text().startswith("up\naside\n") and "aside" not in batch.read_text()
    assert sorted(path.name for path in folder.iterdir()) == sorted([batch.name, rank.name, f"{number}_submission.sh"])


def test_arrays(here: Slurm, folder: Path):
    command = "sh -c 'echo run $SLURM_ARRAY_TASK_ID'"
    job = Sbatch(load("slurm", [*HERE, "array_parallelism=2"]), folder, command, name="x")
    shown = job.text(3)
    assert "#SBATCH --array=0-2%2" in shown.splitlines() and "--array" not in job.text()
    number = job.launch(3)
    assert (folder / f"{number}_submission.sh").read_text() == shown
    logs = [folder / f"{number}_{index}_0_log.out" for index in range(3)]
    here.poll(lambda: all(log.exists() and log.read_text() for log in logs), 60, "they do not run")
    assert [log.read_text() for log in logs] == [f"run {index}\n" for index in range(3)]
    assert all((folder / f"{number}_{index}_log.out").exists() for index in range(3))


def test_dependency(here: Slurm, folder: Path):
    first = Sbatch(load("slurm", HERE), folder, "sleep 600", name="x").launch()
    waiting = load("slurm", [*HERE, "sbatch.dependency=afterany:1"])
    second = Sbatch(waiting, folder, "true", name="y", dependency=f"afterok:{first}").launch()
    assert here.wait(second, "PENDING")["Dependency"] == f"afterok:{first}(unfulfilled)"
    here.cancel(first)
    here.wait(second, "CANCELLED")  # it can never start: no job that waits for ever


def test_what_follows_an_array(here: Slurm, folder: Path):
    """Each job of the second array follows its own of the first, or goes; the last follows them all, however they end."""
    cluster = load("slurm", HERE)
    first = Sbatch(cluster, folder, "sh -c 'exit $SLURM_ARRAY_TASK_ID'", name="first").launch(2)
    second = Sbatch(cluster, folder, "true", name="second", dependency=f"aftercorr:{first}").launch(2)
    last = Sbatch(cluster, folder, "true", name="last", dependency=f"afterany:{first}:{second}").launch()
    here.wait(last, "COMPLETED")
    states = {f"{job}_{index}": here.job(f"{job}_{index}")["JobState"] for job in (first, second) for index in (0, 1)}
    assert list(states.values()) == ["COMPLETED", "FAILED", "COMPLETED", "CANCELLED"]


def test_submission_from_inside_another_allocation(here: Slurm, folder: Path, monkeypatch: pytest.MonkeyPatch):
    """The job is no part of the one that submits it, and is not bent by its variables."""
    dump = here.command("srun", "--nodes=2", "--cpus-per-task=4", "--gpus-per-node=2", "--ntasks=2", "env")
    marks = dict(line.split("=", 1) for line in dump.splitlines() if line.startswith(("SLURM", "CUDA_VIS")))
    assert {"SLURM_JOB_ID", "SLURM_CPUS_PER_TASK", "SLURM_NNODES", "CUDA_VISIBLE_DEVICES"} <= marks.keys()
    for name, value in {**marks, "SBATCH_PARTITION": "high", "SBATCH_ACCOUNT": "kept", "RANK": "7"}.items():
        monkeypatch.setenv(name, value)
    command = "sh -c 'echo $SLURM_NNODES ${RANK-none} ${CUDA_VISIBLE_DEVICES-none} ${SLURM_GPUS_PER_NODE-none}'"
    number = Sbatch(load("slurm", HERE), folder, command, name="x").launch()
    job = here.wait(number, "COMPLETED")
    assert (job["Partition"], job["NumNodes"], job["Account"]) == ("low", "1", "kept")
    assert number != marks["SLURM_JOB_ID"]
    assert (folder / f"{number}_0_log.out").read_text() == "1 none none none\n"


def test_what_slurm_refuses(here: Slurm, folder: Path):
    folder.mkdir()
    with pytest.raises(UserError) as caught:
        Sbatch(load("slurm", [*HERE, "partition=nowhere"]), folder, "true", name="x").launch()
    assert "sbatch refuses the job: invalid partition specified: nowhere" in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 2
    assert not list(folder.iterdir()), "no script is left of what was refused"
