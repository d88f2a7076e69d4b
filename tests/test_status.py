"""How a run stands, while it goes on."""

from pathlib import Path

import pytest

from selfsup import checkpoint, status
from selfsup.checkpoint import State
from selfsup.checkpoint_writer import save


def test_verify_of_a_run_that_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint that is pruned while its digests are computed is not damaged; one that is damaged is told."""
    (tmp_path / "config.yaml").write_text("{}")
    for step in (5, 10):
        save(tmp_path / "checkpoints", step, State({}, {}, {}, {"step": step}))
    verify = checkpoint.verify

    def pruned(folder: Path) -> object:
        if checkpoint.step_of(folder) == 5:
            folder.rename(folder.with_name(".tmp-pruned-step_00000005"))
        return verify(folder)

    monkeypatch.setattr(checkpoint, "verify", pruned)
    assert [(c.folder.name, c.problem) for c in status.verify(tmp_path)] == [("step_00000010", None)]
    (tmp_path / "checkpoints" / "step_00000010" / "trainer.json").unlink()
    (damaged,) = status.verify(tmp_path)
    assert damaged.problem is not None and "trainer.json: missing" in damaged.problem
