"""The projection head: its formula, weight normalisation, and prototypes that can stand still."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from selfsup.heads import DINOHead, Prototypes


def test_prototypes_equal_torch_weight_norm() -> None:
    """Output and gradients are those of torch's own weight normalisation."""
    torch.manual_seed(0)
    ours = Prototypes(6, 9, normalised=False).double()
    theirs = nn.utils.parametrizations.weight_norm(nn.Linear(6, 9, bias=False)).double()
    with torch.no_grad():
        ours.weight_g.uniform_(0.5, 2)
        theirs.parametrizations.weight.original0.copy_(ours.weight_g)
        theirs.parametrizations.weight.original1.copy_(ours.weight_v)
    x = torch.randn(4, 6, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)
    target = torch.randn(4, 9, dtype=torch.float64)
    for module in (ours, theirs):
        (module(x) * target).sum().backward()
    torch.testing.assert_close(ours.weight_g.grad, theirs.parametrizations.weight.original0.grad)
    torch.testing.assert_close(ours.weight_v.grad, theirs.parametrizations.weight.original1.grad)


def test_normalised_prototypes_have_length_one() -> None:
    head = Prototypes(8, 30, normalised=True)
    assert not head.weight_g.requires_grad and head.weight_v.requires_grad
    rows = head(torch.eye(8)).T  # [30, 8]: the effective weight
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(30))


def test_head_is_the_formula_of_the_paper() -> None:
    """Linear-GELU-linear-GELU-linear, l2 norm, prototypes: so logits are cosines and lie within [-1, 1]."""
    torch.manual_seed(0)
    head = DINOHead(7, 20, hidden_dim=11, bottleneck_dim=5, layers=3)
    x = torch.randn(6, 7)
    w = dict(head.mlp.named_parameters())
    h = F.gelu(x @ w["0.weight"].T + w["0.bias"])
    h = F.gelu(h @ w["2.weight"].T + w["2.bias"])
    h = F.normalize(h @ w["4.weight"].T + w["4.bias"], dim=-1)
    v = head.last_layer.weight_v
    torch.testing.assert_close(head(x), h @ (v / v.norm(dim=1, keepdim=True)).T)
    assert head(100 * x).abs().max() <= 1 + 1e-6


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_layers_and_batch_norm(layers: int, batch_norm: bool) -> None:
    """As many linear layers as asked for, a batch norm between each two, none after the bottleneck."""
    head = DINOHead(7, 20, hidden_dim=11, bottleneck_dim=5, layers=layers, batch_norm=batch_norm)
    kinds = [type(m) for m in head.mlp]
    assert kinds.count(nn.Linear) == layers
    assert kinds.count(nn.BatchNorm1d) == (layers - 1 if batch_norm else 0)
    assert kinds.count(nn.GELU) == layers - 1 and kinds[-1] is nn.Linear
    assert head(torch.randn(4, 7)).shape == (4, 20)


def test_initial_weights() -> None:
    """Truncated normal of 0.02 and zero biases, as in the published code."""
    head = DINOHead(300, 64, hidden_dim=500, bottleneck_dim=64)
    for m in head.mlp:
        if isinstance(m, nn.Linear):
            assert m.weight.std().item() == pytest.approx(0.02, rel=0.1) and m.weight.abs().max() <= 2
            assert not m.bias.any()


def test_frozen_prototypes() -> None:
    """No gradient for them, the same gradient for everything before them, the same output."""
    torch.manual_seed(0)
    free = DINOHead(7, 20, hidden_dim=11, bottleneck_dim=5, norm_last_layer=False)
    frozen = copy.deepcopy(free)
    x, target = torch.randn(6, 7), torch.randn(6, 20)
    a, b = free(x), frozen(x, frozen_prototypes=True)
    assert torch.equal(a, b)
    (a * target).sum().backward()
    (b * target).sum().backward()
    assert frozen.last_layer.weight_v.grad is None and frozen.last_layer.weight_g.grad is None
    assert free.last_layer.weight_v.grad is not None and free.last_layer.weight_g.grad is not None
    for p, q in zip(free.mlp.parameters(), frozen.mlp.parameters()):
        assert torch.equal(p.grad, q.grad) and q.grad.any()


def test_half_precision_normalises_in_float32() -> None:
    head = DINOHead(7, 20, hidden_dim=11, bottleneck_dim=5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = head.mlp(torch.randn(6, 7))
        assert hidden.dtype == torch.bfloat16
    seen = []
    head.last_layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        head(torch.randn(6, 7))
    assert seen == [torch.float32]
    seen.clear()
    head.double()(torch.randn(6, 7, dtype=torch.float64))
    assert seen == [torch.float64]


def test_can_be_copied() -> None:
    """Weight normalisation by torch's old hooks breaks deepcopy; a teacher is one."""
    head = DINOHead(7, 20, hidden_dim=11, bottleneck_dim=5)
    other = copy.deepcopy(head)
    x = torch.randn(3, 7)
    assert torch.equal(head(x), other(x))
    assert sorted(k for k in head.state_dict() if k.startswith("last_layer")) == [
        "last_layer.weight_g",
        "last_layer.weight_v",
    ]
