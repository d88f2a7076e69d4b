"""Ranks and their hosts from the variables of a scheduler; against what a real Slurm says of itself."""

import os
import sys
from pathlib import Path

import pytest

from selfsup.errors import UserError
from selfsup.launch import environment
from selfsup.launch.environment import Place, expand_counts, expand_hosts, find
from tests.slurm.cluster import Slurm

SLURM = {
    "SLURM_JOB_ID": "15",
    "SLURM_PROCID": "4",
    "SLURM_NTASKS": "5",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "2",
    "SLURM_TASKS_PER_NODE": "2(x2),1",
    "SLURM_JOB_NODELIST": "n[1-3]",
}
SUPERVISOR = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "SELFSUP_JOB": "local-0123abcd",
    "SELFSUP_RESTART": "3",
}


def test_a_task_of_slurm():
    hosts = ("n1", "n1", "n2", "n2", "n3")
    found = find(SLURM)
    assert found == Place("15", 0, 4, 5, 0, 1, 2, "n3", hosts)
    assert (found.key, found.main_host) == ("15.0", "n1")
    array = find({**SLURM, "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3", "SLURM_RESTART_COUNT": "2"})
    assert (array.job, array.key) == ("12_3", "12_3.2")
    cyclic = find({**SLURM, "SLURM_DISTRIBUTION": "cyclic"})
    assert cyclic.hosts == ("n1", "n2", "n3", "n1", "n2")
    step = {"SLURM_STEP_NODELIST": "n[3,1]", "SLURM_STEP_TASKS_PER_NODE": "4,1", "SLURM_NODEID": "1"}
    assert find({**SLURM, **step}).hosts == ("n3", "n3", "n3", "n3", "n1")


def test_a_rank_of_the_supervisor():
    found = find(SUPERVISOR)
    assert (found.job, found.restart, found.rank, found.world) == ("local-0123abcd", 3, 1, 2)
    assert found.hosts == ("127.0.0.1",) * 2
    assert find({**SUPERVISOR, **SLURM}).job == "15", "a step of Slurm is what it says, whatever was exported to it"


@pytest.mark.parametrize("name", sorted(SLURM.keys() - {"SLURM_JOB_ID", "SLURM_PROCID"}))
def test_what_is_missing_is_named(name: str):
    with pytest.raises(UserError, match=name):
        find({key: value for key, value in SLURM.items() if key != name})


@pytest.mark.parametrize("name", sorted(SUPERVISOR.keys() - {"RANK"}))
def test_what_is_missing_of_the_supervisor_is_named(name: str):
    with pytest.raises(UserError, match=name):
        find({key: value for key, value in SUPERVISOR.items() if key != name})


def test_no_job():
    with pytest.raises(UserError, match=r"SLURM_PROCID.*RANK.*submit"):
        find({})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"SLURM_PROCID": "x"}, "SLURM_PROCID='x'"),
        ({"SLURM_NTASKS": "6"}, "do not agree"),
        ({"SLURM_TASKS_PER_NODE": "2,x"}, "2\\(x3\\),1"),
        ({"SLURM_NODEID": "3"}, "do not agree"),
        ({"SLURM_JOB_NODELIST": "n[1-"}, "list of nodes|do not agree"),
    ],
)
def test_what_is_wrong_is_named(given: dict[str, str], words: str):
    with pytest.raises(UserError, match=words) as caught:
        find({**SLURM, **given})
    assert len(str(caught.value).splitlines()) <= 2


def test_what_ranks_see(monkeypatch: pytest.MonkeyPatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "old")
    for name in ("SELFSUP_JOB", "SELFSUP_RESTART"):
        monkeypatch.setenv(name, "old")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    place = find(SLURM)
    environment.export(place)
    assert "MASTER_PORT" not in os.environ
    environment.export(place, 29500)
    names = "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK MASTER_ADDR MASTER_PORT SELFSUP_JOB SELFSUP_RESTART"
    assert [os.environ[name] for name in names.split()] == ["4", "5", "0", "1", "2", "n1", "29500", "15", "0"]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2,3"


def test_counts():
    assert expand_counts("2(x3),1") == (2, 2, 2, 1)
    assert expand_counts("8") == (8,)


LISTS = ["n1", "n[1-3]", "a,b", "n[01-03,7],gpu[098-102]", "r[1-2]n[08-11]", "x-1,y-2[3-4]", "node[9-11],login0"]


@pytest.mark.parametrize("text", ["n[a]", "", ","])
def test_no_list_of_nodes(text: str):
    with pytest.raises(UserError, match="list of nodes"):
        expand_hosts(text)


# -------------------------------------------------------------------------------------------------- on a real Slurm


def test_names_are_those_that_slurm_says(slurm: Slurm):
    for text in LISTS:
        assert expand_hosts(text) == tuple(slurm.command("scontrol", "show", "hostnames", text).split()), text


SHOW = """
from selfsup.launch.environment import find
place = find()
print(place.rank, place.world, place.local_rank, place.local_world, place.node_rank, place.node, *place.hosts)
"""


@pytest.mark.parametrize("how", ["--distribution=block", "--distribution=cyclic"])
def test_tasks_of_a_real_job(slurm: Slurm, tmp_path: Path, how: str):
    """Three tasks, unevenly: each is where the layout says."""
    (tmp_path / "show.py").write_text(SHOW)
    out = slurm.command("srun", "--nodes=2", "--ntasks=3", how, sys.executable, str(tmp_path / "show.py"))
    lines = sorted(line.split() for line in out.splitlines())
    assert [line[:2] for line in lines] == [["0", "3"], ["1", "3"], ["2", "3"]]
    hosts = lines[0][6:]
    assert sorted(hosts) == ["n1", "n1", "n2"] and all(line[6:] == hosts for line in lines)
    assert [line[5] for line in lines] == hosts
    for line in lines:
        assert int(line[3]) == hosts.count(line[5]) and int(line[2]) < int(line[3])
        assert line[4] == str(["n1", "n2"].index(line[5]))
