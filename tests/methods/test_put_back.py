"""What the trainer puts back after a refused step, of networks with batch norm: running statistics, and nothing larger."""

import copy
from pathlib import Path

import pytest
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from selfsup import methods
from selfsup.config import load
from selfsup.methods.contract import ViewBatch
from selfsup.train import _moved_by_forward, _put_back
from tests.methods.test_contract import built
from tests.methods.tiny import METHOD_OPTIONS, TINY_RUN, write_images
from tests.test_resume import VITS

CONVOLUTIONS = ["backbone=resnet10t", "backbone.channels=[8,16,16,32]", "backbone.stem_width=8"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"), classes=4)


@pytest.mark.parametrize("name", sorted(methods.METHODS.keys() - VITS))
def test_running_statistics_alone(name: str, images: Path) -> None:
    """A forward pass moves what is put back and what after_step empties; a queue, a centre and a memory are not copied."""
    given = [*TINY_RUN, *METHOD_OPTIONS[name], f"method={name}", f"data={images}", "data.classes=4", "precision=fp32"]
    config = load(None, [option for option in given if not option.startswith("backbone")] + CONVOLUTIONS)
    method, views, s = built(config)
    assert method.batch_statistics
    moved = _moved_by_forward(method)
    kept = {id(b) for b in moved}
    running = {id(b) for m in method.modules() if isinstance(m, _BatchNorm) for b in m.buffers(recurse=False)}
    assert running and running <= kept
    assert all(id(b) not in kept for b in method.buffers(recurse=False))
    assert sum(b.numel() for b in moved) < 5_000
    state, before = copy.deepcopy(method.state_dict()), [b.clone() for b in moved]
    assert torch.isfinite(method(views, s)["loss"])
    assert any(not torch.equal(b, old) for b, old in zip(moved, before))
    _put_back(moved, before, torch.zeros(()))
    method.after_step(s, torch.zeros(()))
    broken = ViewBatch(
        [torch.full_like(x, torch.nan) for x in views.images], views.positions, views.labels, views.ids, views.step, 8
    )
    assert not torch.isfinite(method(broken, s)["loss"])
    _put_back(moved, before, torch.zeros(()))
    method.after_step(s, torch.zeros(()))
    after = method.state_dict()
    assert [key for key in state if not torch.equal(after[key], state[key])] == []
    healthy = method(views, s)
    method.after_step(s, torch.ones(()))
    assert all(torch.isfinite(v).all() for v in [*healthy.values(), *method.state_dict().values()])
