"""Sweeps: how values are written, which key is meant, what the folders are called, and what is refused before anything is."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfsup.errors import UserError
from selfsup.launch.script import check_folder
from selfsup.launch.sweep import Sweep, expand, folder_names


def sweep(*options: str, overrides: tuple[str, ...] = ()) -> Sweep:
    """Of the demo."""
    return expand(options, "demo", overrides)


def refusal(*options: str, overrides: tuple[str, ...] = ()) -> str:
    """At most two lines."""
    with pytest.raises(UserError) as caught:
        sweep(*options, overrides=overrides)
    assert 0 < len(str(caught.value).splitlines()) <= 2
    return str(caught.value)


def test_cartesian_product_in_the_order_given():
    found = sweep("lr=1e-3,5e-4", "seed=0,1,2", overrides=("steps=40",))
    assert found.values == {"optimizer.lr": [0.001, 0.0005], "seed": [0, 1, 2]}
    assert [member.folder for member in found.members] == [
        "optimizer.lr=0.001,seed=0",
        "optimizer.lr=0.001,seed=1",
        "optimizer.lr=0.001,seed=2",
        "optimizer.lr=0.0005,seed=0",
        "optimizer.lr=0.0005,seed=1",
        "optimizer.lr=0.0005,seed=2",
    ]
    assert [(m.config.optimizer.lr, m.config.seed) for m in found.members] == [
        (lr, seed) for lr in (0.001, 0.0005) for seed in (0, 1, 2)
    ]
    assert all(member.config.steps == 40 and member.config.epochs is None for member in found.members)
    assert found.members[3].overrides == ("optimizer.lr=5e-4", "seed=0")
    assert found.notes == ["--sweep lr: taken as optimizer.lr"]


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("views.global.scale=[0.4,1.0],[0.2,1.0]", [[0.4, 1.0], [0.2, 1.0]]),
        ("views.global.scale=[0.4,1.0]", [[0.4, 1.0]]),
        ("eval.k=[10,20], [5]", [[10, 20], [5]]),
        ("eval.train='a,b',\"c, d\",e", ["a,b", "c, d", "e"]),
        ("eval.train=it's,b", ["it's", "b"]),
        ("eval.train=größer/走る,/b c/d", ["größer/走る", "/b c/d"]),
        ("views.local={count: 2, size: 16},{count: 1}", [{"count": 2, "size": 16}, {"count": 1}]),
        ("optimizer.weight_decay_end=null,0.4", [None, 0.4]),
        ("grad_checkpointing=true,false", [True, False]),
        ("optimizer.lr=1e-3,5E-4,1", [0.001, 0.0005, 1]),
        ("optimizer.warmup=10%,5 steps", ["10%", "5 steps"]),
        ("method.out_dim=16,32", [16, 32]),
        ("out_dim=16,32", [16, 32]),
        ("data=007,8,'9'", ["007", "8", "9"]),
    ],
)
def test_values(option: str, values: list[object]):
    (found,) = sweep(option).values.values()
    assert found == values and [type(value) for value in found] == [type(value) for value in values]
    assert json.loads(json.dumps(found)) == found


def test_values_reach_the_configuration():
    (first, other) = sweep("views.global.scale=[0.4,1.0],[0.2,1.0]").members
    assert (first.config.views.global_.scale, other.config.views.global_.scale) == ((0.4, 1.0), (0.2, 1.0))
    assert (first.folder, other.folder) == ("views.global.scale=0.4+1.0", "views.global.scale=0.2+1.0")
    assert [m.config.data.path for m in sweep("data=007,'a,b'").members] == ["007", "a,b"]
    assert [m.config.optimizer.name for m in sweep("optimizer=sgd,adamw", overrides=("steps=3",)).members] == [
        "sgd",
        "adamw",
    ]


@pytest.mark.parametrize(
    ("option", "key"),
    [
        ("lr=1,2", "optimizer.lr"),
        ("warmup=1 steps,2 steps", "optimizer.warmup"),
        ("global.size=28,32", "views.global.size"),
        ("data=a,b", "data.path"),
        ("data.path=a,b", "data.path"),
        ("method.anything_at_all=1,2", "method.anything_at_all"),
        ("keep_last=1,2", "checkpoint.keep_last"),
    ],
)
def test_which_key_is_meant(option: str, key: str):
    found = sweep(option)
    assert list(found.values) == [key]
    assert [note.endswith(f": taken as {key}") for note in found.notes] == [True] * (
        option.partition("=")[0] not in (key, "data")
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["size=28,32"], "size may be views.global.size or views.local.size or teacher.size; write it in full"),
        (["momentum=0.9,0.8"], "momentum may be optimizer.momentum or method.momentum"),
        (["sed=1,2"], "no recipe has a key 'sed'; did you mean seed?"),
        (["optimizer.lrr=1,2"], "did you mean optimizer.lr?"),
        (["weight_decy=1,2"], "did you mean weight_decay?"),
        (
            ["teacher_temp=1,2"],
            "no recipe has a key 'teacher_temp'; did you mean teacher? Options that the recipe does not give",
        ),
        (["nodes=1,2"], "nodes is a key of the cluster"),
        (["lr=1,2", "optimizer.lr=3,4"], "optimizer.lr is given twice"),
        (["seed=1,1"], "seed=1 and seed=1 are the same run"),
        (["optimizer.lr=1e-3,0.001"], "are the same run"),
        (["seed=1,two"], "seed='two'"),
        (["optimizer.lr=1e-3,-1"], "optimizer.lr=-1"),
        (["seed"], "write KEY=A,B,C"),
        (["=1,2"], "write KEY=A,B,C"),
        (["seed="], "write KEY=A,B,C"),
        (["seed=1,,2"], "write KEY=A,B,C"),
        (["seed=1,2,"], "write KEY=A,B,C"),
        (["views.global.scale=[0.4,1.0"], "write KEY=A,B,C"),
        (["eval.train='a,b"], "write KEY=A,B,C"),
        (["seed=1]"], "write KEY=A,B,C"),
        (["seed=1\n2"], "seed="),
        (
            [f"seed={','.join(map(str, range(100)))}", f"steps={','.join(map(str, range(1, 101)))}"],
            "10000 combinations",
        ),
    ],
)
def test_refusals(options: list[str], expected: str):
    assert expected in refusal(*options)


def test_a_key_that_is_an_override_as_well():
    assert "seed is given as an override as well" in refusal("seed=1,2", overrides=("seed=3",))
    assert "data.path is given as an override" in refusal("data.path=1,2", overrides=("data=3",))
    assert "optimizer.lr is given as an override" in refusal("lr=1,2", overrides=("optimizer.lr=3",))


def test_folder_names():
    """Plain where they can be; else told apart by a digest, also where only the case differs."""
    assert folder_names(["lr=0.1,seed=0", "a=größer"]) == ["lr=0.1,seed=0", "a=größer"]
    assert folder_names(["d=/a/b"]) == ["d=-a-b"]
    several = folder_names(["d=/a/b", "d=-a-b", "d=A", "d=a", "d=x"])
    assert several[4] == "d=x" and len({name.casefold() for name in several}) == 5
    assert all(name.startswith(("d=-a-b-", "d=A-", "d=a-", "d=x")) for name in several)
    long = folder_names(["d=" + "走" * 100, "d=" + "走" * 101])
    assert len(set(long)) == 2 and all(len(name.encode()) <= 100 for name in long)


@given(st.lists(st.text(), unique=True, min_size=1, max_size=5))
def test_folder_names_of_anything(texts: list[str]):
    """Slurm and a file system take them, and no two are one."""
    names = folder_names([f"key={text}" for text in texts])
    for name in names:
        check_folder(Path("/runs") / name)
        assert len(name.encode()) <= 100 and "/" not in name and name.startswith("key=") and name.isprintable()
    assert len({name.casefold() for name in names}) == len(texts)
