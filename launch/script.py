"""The sbatch script of a job, made by submitit, and its submission: what `text()` shows is what `launch()` submits."""

import os
import re
import shlex
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from submitit import SlurmExecutor
from submitit.core.utils import FailedJobError, FailedSubmissionError

from selfsup.errors import UserError
from selfsup.wording import printable

from .cluster import Cluster
from .environment import OF_A_RANK

_NOT_OF_SBATCH = {
    "additional_parameters",
    "array_parallelism",
    "num_gpus",
    "setup",
    "signal_delay_s",
    "srun_args",
    "stderr_to_stdout",
    "teardown",
    "use_srun",
}
"""Parameters of submitit's executor that are no options of sbatch."""

# Variables of a job or a rank: one that submits another must not hand them on.
_OF_A_JOB = ("SLURM_", "SLURMD_", "SUBMITIT_", "PMI_", "PMIX_", "TORCHELASTIC_", "SBATCH_CPU_BIND", "SBATCH_MEM_BIND")
_DEVICES = {"CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL"}
_KEPT = {"SLURM_CONF", "SLURM_CLUSTERS"}
# SBATCH_NAME sets an option, and wins over the script. Some are not called like the option.
_VARIABLES = {"timelimit": "time", "mem_per_node": "mem", "kill_invalid_dep": "kill_on_invalid_dep"}
_ALWAYS_WRITTEN = {"array_inx", "error", "input", "job_name", "no_requeue", "open_mode", "output", "requeue", "signal"}


class Sbatch(SlurmExecutor):
    """submitit's executor with the parameters of a cluster, whose tasks each run `command`, a line of shell.

    folder: for the script, JOB_submission.sh, and the logs: JOB_RANK_log.out holds what a rank writes (JOB is
    ARRAY_INDEX for an array), JOB_log.out what the script itself and srun write; it must be seen by every node.
    after: lines of shell that follow when all tasks have ended, also after a SIGTERM to the whole job.
    Works without Slurm until `launch`, so that a script can be read anywhere.
    """

    def __init__(
        self,
        cluster: Cluster,
        folder: Path,
        command: str,
        *,
        name: str,
        dependency: str | None = None,
        after: Sequence[str] = (),
    ) -> None:
        if cluster.kind != "slurm":
            raise ValueError(f"a script is for kind: slurm, not {cluster.kind}")
        check_folder(folder)
        super().__init__(folder)
        self.command = f"{cluster.container} {command}" if cluster.container else command
        self.update_parameters(**parameters(cluster, name=name, dependency=dependency, after=after))
        self._written: Path | None = None

    @classmethod
    def affinity(cls) -> int:
        """Whether there is a Slurm is asked by `launch`."""
        return 2

    @property
    def _submitit_command_str(self) -> str:
        return self.command

    def _make_submission_command(self, submission_file_path: Path) -> list[str]:
        self._written = submission_file_path
        unset = [word for name in self.not_inherited() for word in ("-u", name)]
        sbatch = list(super()._make_submission_command(submission_file_path))
        return ["env", *unset, *sbatch] if unset else sbatch

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        return super()._make_submission_file_text(command, uid).rstrip() + "\n"

    def not_inherited(self) -> list[str]:
        """Variables of this process that the job does not get."""
        return foreign_variables(os.environ, self.parameters)

    def text(self, count: int | None = None) -> str:
        """The script. count: of an array of so many jobs."""
        self._set_count(count)
        return self._make_submission_file_text(self._submitit_command_str, "")

    def launch(self, count: int | None = None) -> str:
        """Submit it; the job's id. UserError with Slurm's words if Slurm does not take it."""
        self._set_count(count)
        if shutil.which("sbatch") is None:
            raise UserError("sbatch is not found: submit where Slurm is (or load its module); --dry-run needs none")
        Path(self.folder).mkdir(parents=True, exist_ok=True)
        try:
            return str(self._submit_command(self._submitit_command_str).job_id)
        except (FailedJobError, FailedSubmissionError) as error:
            said = re.findall(r"^sbatch: (?:error: )?(.*)$", str(error), re.M) or [str(error).strip().splitlines()[-1]]
            raise UserError(f"sbatch refuses the job: {'; '.join(said)}") from None
        finally:
            if self._written is not None:  # the script, or where it was before it had a number
                self._written.unlink(missing_ok=True)

    def _set_count(self, count: int | None) -> None:
        self.parameters.pop("map_count", None)
        if count is not None:
            self.parameters["map_count"] = count
        # submitit would mix what the script and srun say into the log of rank 0
        own = Path(self.folder) / ("%j_log.out" if count is None else "%A_%a_log.out")
        self.parameters["additional_parameters"]["output"] = str(own)


def check_folder(folder: Path) -> None:
    """UserError if Slurm would take characters of this path for something else."""
    bad = [c for c in str(folder.absolute()) if c in "%\\'\"" or not c.isprintable()]
    if bad:
        raise UserError(
            f"run folder {printable(str(folder))}: Slurm takes {bad[0]!r} in the path of a log for something else"
        )


_SURVIVE = (
    "set +e # whatever the lines above chose, what follows srun decides about a requeue",
    "trap : TERM USR1 USR2 # preemption, limits and scancel may end the script as well, which would then decide nothing",
)


def parameters(
    cluster: Cluster, *, name: str, dependency: str | None = None, after: Sequence[str] = ()
) -> dict[str, Any]:
    """The parameters of submitit's executor. What is None is left to the partition."""
    gpus = f"{cluster.gpu_type}:{cluster.gpus_per_node}" if cluster.gpu_type else cluster.gpus_per_node
    asked = cluster.gpu_request if cluster.gpus_per_node else "none"
    values: dict[str, Any] = {
        "job_name": name,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "time": cluster.time,
        "nodes": cluster.nodes,
        "ntasks_per_node": cluster.tasks,
        "cpus_per_task": cluster.cpus_per_task,
        "gpus_per_node": gpus if asked == "gpus-per-node" else None,
        "gres": f"gpu:{gpus}" if asked == "gres" else None,
        "mem": cluster.mem,
        "dependency": dependency,
        "wckey": None,  # submitit's default is refused where such keys are checked
        "array_parallelism": cluster.array_parallelism or 16,
        "signal_delay_s": cluster.signal_before_s,
        "setup": [*(f"export {k}={shlex.quote(v)}" for k, v in cluster.env.items()), *cluster.setup, *_SURVIVE],
        "teardown": [*after] or None,
        "stderr_to_stdout": True,
    }
    known = SlurmExecutor._valid_parameters() - _NOT_OF_SBATCH
    further: dict[str, Any] = {"requeue": True}
    if dependency:  # else a job whose condition can never hold is queued for ever
        further["kill-on-invalid-dep"] = "yes"
    for option, value in cluster.sbatch.items():
        if option == "dependency" and dependency:  # that of the first job holds for those that wait for it
            continue
        if (key := option.replace("-", "_")) in known:
            values[key] = None if value is False else value
        else:
            further[option] = value
    values["additional_parameters"] = {key: value for key, value in further.items() if value not in (None, False)}
    # since Slurm 22.05 srun does not inherit --cpus-per-task; without the other, ranks wait for one that is dead
    own = {"cpus-per-task": cluster.cpus_per_task, "kill-on-bad-exit": 1}
    values["srun_args"] = list(_arguments({**own, **cluster.srun}))
    return values


def _arguments(options: Mapping[str, Any]) -> Iterable[str]:
    for name, value in options.items():
        if value is not None and value is not False:
            yield f"--{name}" if value is True else f"--{name}={value}"


def foreign_variables(environ: Mapping[str, str], written: Mapping[str, Any]) -> list[str]:
    """Variables that the job must not inherit: those of a job that submits it, and what would win over the script.

    written: the script's parameters. SBATCH_ACCOUNT and the like, which people set for good, count where it says nothing.
    """
    own = {key for key, value in written.items() if value is not None} | _ALWAYS_WRITTEN
    own |= {key.replace("-", "_") for key in written.get("additional_parameters") or ()}
    found = []
    for name in environ:
        option = name.removeprefix("SBATCH_").lower() if name.startswith("SBATCH_") else ""
        of_a_job = name.startswith(_OF_A_JOB) and name not in _KEPT
        if of_a_job or name in OF_A_RANK | _DEVICES or _VARIABLES.get(option, option) in own:
            found.append(name)
    return sorted(found)
