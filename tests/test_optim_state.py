"""State of every optimizer as a table of tensors and back; tables that belong to another one are refused whole."""

import pytest
import torch
from torch import Tensor, nn

from selfsup.config import load
from selfsup.optim import create_optimizer, guarded_step, parameter_groups, set_hyperparameters
from selfsup.optim_state import load_state_tensors, state_tensors
from tests.test_optim import OPTIMIZERS, PEAK, bits, build, step


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_round_trip_continues_bitwise(name: str, dtype: torch.dtype) -> None:
    """Three steps, state through a dict of tensors into a new optimizer, three more: as six without a break."""
    (model, optimizer), (other, fresh) = build(name, dtype), build(name, dtype)
    for seed in range(3):
        step(model, optimizer, seed)
    held = {k: v.clone() for k, v in state_tensors(optimizer).items()}
    other.load_state_dict(model.state_dict())
    step(other, fresh, 77)  # what it knew is forgotten
    other.load_state_dict(model.state_dict())
    load_state_tensors(fresh, held)
    for seed in range(3, 6):
        step(model, optimizer, seed)
        step(other, fresh, seed)
    first, second = bits(model, optimizer), bits(other, fresh)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_convolutions_keep_their_strides(name: str) -> None:
    """Weights that are channels-last in memory, as the trainer's are: moments of the same strides, and the same bits."""
    config = load(None, [f"optimizer={name.split()[0]}", *OPTIMIZERS[name]]).optimizer
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        network = nn.Conv2d(17, 18, 3).to(memory_format=torch.channels_last)
        runs.append((network, create_optimizer(config, parameter_groups(list(network.named_parameters())), PEAK)))

    def move(network: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        set_hyperparameters(optimizer, PEAK, 0.05)
        optimizer.zero_grad(set_to_none=True)
        x = torch.randn(2, 17, 5, 5, generator=torch.Generator().manual_seed(seed))
        network(x.to(memory_format=torch.channels_last)).pow(2).mean().backward()
        guarded_step(optimizer, torch.ones(()))

    for seed in range(2):
        move(*runs[0], seed)
    runs[1][0].load_state_dict(runs[0][0].state_dict())
    # as from a file, where tensors are contiguous
    load_state_tensors(
        runs[1][1], {k: v.clone(memory_format=torch.contiguous_format) for k, v in state_tensors(runs[0][1]).items()}
    )
    for seed in range(2, 5):
        for run in runs:
            move(*run, seed)
    first, second = bits(*runs[0]), bits(*runs[1])
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    for key, value in state_tensors(runs[1][1]).items():
        if value.shape == runs[1][0].weight.shape:
            assert value.stride() == runs[1][0].weight.stride(), key


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_before_the_first_step(name: str) -> None:
    (model, optimizer), (other, fresh) = build(name), build(name)
    step(other, fresh, 77)
    other.load_state_dict(model.state_dict())
    load_state_tensors(fresh, state_tensors(optimizer))
    for seed in range(2):
        step(model, optimizer, seed)
        step(other, fresh, seed)
    first, second = bits(model, optimizer), bits(other, fresh)
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_refused_right_after_loading(name: str) -> None:
    model, optimizer = build(name)
    step(model, optimizer, 0)
    held = {k: v.clone() for k, v in state_tensors(optimizer).items()}
    load_state_tensors(optimizer, held)
    before = bits(model, optimizer)
    step(model, optimizer, 9, ok=0.0)
    after = bits(model, optimizer)
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize("name", ["sgd", "sgd nesterov", "lars"])
def test_momentum_that_a_table_lacks_is_zero(name: str) -> None:
    """Of a parameter that had no gradient so far: a step that is refused first leaves nothing undefined."""
    model, optimizer = build(name)
    step(model, optimizer, 0)
    load_state_tensors(optimizer, {k: v for k, v in state_tensors(optimizer).items() if not k.startswith("head.")})
    step(model, optimizer, 9, ok=0.0)
    held = state_tensors(optimizer)
    assert not held["head.weight|momentum_buffer"].any() and not held["head.bias|momentum_buffer"].any()
    assert held["backbone.blocks.0.weight|momentum_buffer"].any()


def test_does_not_alias() -> None:
    model, optimizer = build("adamw")
    step(model, optimizer, 0)
    held = state_tensors(optimizer)
    _, fresh = build("adamw")
    load_state_tensors(fresh, held)
    assert all(v.data_ptr() != held[k].data_ptr() for k, v in state_tensors(fresh).items())


def damaged(held: dict[str, Tensor], like: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Tables that are nearly right: each is refused."""
    moment = next(k for k, v in held.items() if v.ndim > 1 and not k.endswith("|step"))
    wrong = {
        "scalar": torch.zeros(()),
        "short": torch.zeros(1),
        "flat": held[moment].flatten(),
        "integers": held[moment].int(),
        "half": held[moment].half(),
        "double": held[moment].double(),
    }
    out = {kind: {**held, moment: value} for kind, value in wrong.items()}
    out["unknown parameter"] = {**held, "nobody|exp_avg": torch.zeros(2)}
    out["unknown key"] = {**held, moment.rpartition("|")[0] + "|momentum": torch.zeros_like(held[moment])}
    steps = [k for k in held if k.endswith("|step")]
    if len({k.rpartition("|")[2] for k in held}) > 1:
        out["lacking"] = {k: v for k, v in held.items() if k != moment}
    for kind, value in (("nan", torch.nan), ("infinite", torch.inf), ("negative", -1.0)) if steps else ():
        out[f"{kind} step"] = {**held, steps[0]: torch.tensor(value)}
    if like:
        out["of another optimizer"] = like
    return out


@pytest.mark.parametrize("name", [n for n in OPTIMIZERS if "without momentum" not in n])
def test_strangers_are_refused_and_change_nothing(name: str) -> None:
    """Kernels trust shapes and types: a moment that is too small would be read beyond its end."""
    model, optimizer = build(name)
    other, stranger = build("sgd" if "sgd" not in name and "lars" not in name else "adamw")
    step(model, optimizer, 0)
    step(other, stranger, 0)
    held = {k: v.clone() for k, v in state_tensors(optimizer).items()}
    before = bits(model, optimizer)
    for kind, table in damaged(held, state_tensors(stranger)).items():
        with pytest.raises(KeyError):
            load_state_tensors(optimizer, table)
            pytest.fail(f"{name} takes a table that is wrong: {kind}")
        after = bits(model, optimizer)
        assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before), kind


@pytest.mark.parametrize("name", ["lamb", "adabound"])
def test_counts_of_a_group_must_agree(name: str) -> None:
    """A parameter that has had no gradient yet has its group's count all the same, and no moments."""
    model, optimizer = build(name)
    for seed in range(2):
        step(model, optimizer, seed)
    held = {k: v.clone() for k, v in state_tensors(optimizer).items()}
    assert held["unused|step"] == 2 and [k for k in held if k.startswith("unused|")] == ["unused|step"]
    for table in (
        {**held, "unused|step": torch.tensor(5.0, dtype=held["unused|step"].dtype)},
        {k: v for k, v in held.items() if k != "unused|step"},
    ):
        with pytest.raises(KeyError, match="step"):
            load_state_tensors(optimizer, table)


def test_adafactor_is_factored() -> None:
    """A row and a column of second moments for a matrix: what its checkpoint is small for."""
    model, optimizer = build("adafactor")
    step(model, optimizer, 0)
    held = state_tensors(optimizer)
    name = "backbone.blocks.0.weight"
    assert held[f"{name}|exp_avg_sq_r"].numel() == held[f"{name}|exp_avg_sq_c"].numel() == 16
    assert held[f"{name}|exp_avg"].dtype == torch.bfloat16 and f"{name}|exp_avg_sq" not in held
    assert held["head.weight|exp_avg_sq"].shape == (2, 16)  # too small to factor
