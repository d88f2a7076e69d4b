"""slurm.conf and gres.conf of the test cluster."""

import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def slurm_conf(
    folder: Path, nodes: Sequence[str], ports: Sequence[int], *, sacct: bool, user_signal: bool, **settings: Any
) -> str:
    """The text. ports: slurmctld's and one for each node; settings: further lines, which win (None leaves one out)."""
    host, controller, *others = socket.gethostname().partition(".")[0], *ports
    lines: dict[str, object] = {
        "ClusterName": "test",
        "SlurmctldHost": f"{host}(127.0.0.1)",
        "SlurmctldPort": controller,
        "SlurmUser": "root",
        "SlurmdUser": "root",
        "AuthType": "auth/munge",
        "AuthInfo": f"socket={folder}/munge/sock,cred_expire=5",  # by default a requeue waits two minutes
        "StateSaveLocation": folder / "state",
        "SlurmdSpoolDir": folder / "spool/%n",
        "SlurmctldPidFile": folder / "run/slurmctld.pid",
        "SlurmdPidFile": folder / "run/slurmd-%n.pid",
        "SlurmctldLogFile": folder / "log/slurmctld.log",
        "SlurmdLogFile": folder / "log/slurmd-%n.log",
        "SwitchType": "switch/none",
        "MpiDefault": "none",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "JobAcctGatherType": "jobacct_gather/none",
        "AccountingStorageType": "accounting_storage/none",
        "JobCompType": "jobcomp/filetxt" if sacct else "jobcomp/none",
        "JobCompLoc": folder / "log/jobcomp.txt",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_Core",
        # by default a job that waited, as every requeued one does, starts up to 30 s after it could
        "SchedulerParameters": "batch_sched_delay=0,sched_min_interval=0,sched_interval=2,bf_interval=2",
        "SlurmdParameters": "config_overrides",  # more CPUs than there are
        "ReturnToService": 2,
        "JobRequeue": 1,
        "KillWait": 10,
        "MinJobAge": 600,
        "SlurmdTimeout": 30,
        "PreemptType": "preempt/partition_prio",
        "PreemptMode": "REQUEUE",
        "SlurmctldParameters": "preempt_send_user_signal" if user_signal else None,
        "GresTypes": "gpu",
    }
    grace, mode = settings.pop("GraceTime", 30), settings.pop("PreemptMode", "REQUEUE")  # a partition's
    lines |= settings
    text = [f"{key}={value}" for key, value in lines.items() if value is not None]
    for node, port in zip(nodes, others):
        text.append(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=8 RealMemory=8000 Gres=gpu:2"
        )
    text.append(f"PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode={mode} GraceTime={grace}")
    text.append("PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF")
    return "\n".join(text) + "\n"


def gres_conf(folder: Path, nodes: Sequence[str]) -> str:
    """Two devices a node; without a file for each, nodes are INVAL."""
    return f"NodeName={','.join(nodes)} Name=gpu File={folder}/gpu[0-1]\n"
