"""`shortcuts=[...]`: each way of computing a DINO step gives the same loss, gradients and centre as the plain one."""

import pytest
import torch

from selfsup import methods, schedules
from selfsup.methods.contract import ViewBatch
from selfsup.schema.kinds import Shortcut
from tests.methods.tiny import tiny_config

ALL: tuple[Shortcut, ...] = ("packed", "cls", "prototypes", "heap")


def step(shortcuts: tuple[str, ...], *overrides: str):
    """(loss, gradients, centre after the step) in float64 of a tiny DINO whose prototypes train."""
    config = methods.complete(tiny_config("dino", "data=unused", f"shortcuts=[{','.join(shortcuts)}]", *overrides))
    assert config.shortcuts == shortcuts
    method = methods.create(config).double().train()
    r = torch.Generator().manual_seed(0)
    images = [torch.randn(v, 4, 3, s, s, generator=r, dtype=torch.float64) for v, s in ((2, 32), (3, 16))]
    batch = ViewBatch(images, torch.arange(4), torch.full((4,), -1), torch.arange(4), step=5, global_batch=4)
    s = schedules.evaluate(method.schedules(schedules.plan(config, 40)), 5)
    out = method(batch, s)
    out["loss"].backward()
    method.after_step(s, torch.ones(()))
    grads = {k: p.grad for k, p in method.named_parameters() if p.grad is not None}
    return out, grads, method.center


@pytest.mark.parametrize("overrides", [(), ("backbone.drop_path_rate=0.3",)], ids=str)
@pytest.mark.parametrize("shortcuts", [("packed",), ("packed", "cls"), ("prototypes",), ALL], ids="-".join)
def test_same_step(shortcuts: tuple[str, ...], overrides: tuple[str, ...]) -> None:
    out, grads, center = step(shortcuts, *overrides)
    expected, references, reference_center = step((), *overrides)
    assert out.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(out[key], value, rtol=1e-6, atol=1e-9, msg=key)
    assert grads.keys() == references.keys()
    largest = max(g.abs().max() for g in references.values())
    for key, g in references.items():
        assert (grads[key] - g).abs().max() <= 1e-9 * max(g.abs().max(), 1e-3 * largest), key
    torch.testing.assert_close(center, reference_center, rtol=1e-9, atol=1e-12)


def test_all_are_taken_by_default_and_can_be_refused() -> None:
    assert tiny_config("dino", "data=unused").shortcuts == ALL
    assert tiny_config("dino", "data=unused", "shortcuts=[]").shortcuts == ()
