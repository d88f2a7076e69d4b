"""Every demo recipe as it is: some steps, and k-NN of what comes out; nothing but its name is needed."""

import json
from pathlib import Path

import pytest

import selfsup
from selfsup.config import recipe_names
from selfsup.eval import knn
from selfsup.eval.classify import run as classify
from selfsup.methods.load import load_classifiers

DEMOS = [name for name in recipe_names() if name == "demo" or name.endswith("_demo")]


ROWS = {
    "demo": "DINO: EMA teacher, centring, sharpening, multi-crop, heads, schedules",
    "dinov2_gram_demo": "Gram anchoring (DINOv3)",
    "distill_demo": (
        "Knowledge distillation: any teacher, losses on logits, features, relations; several students; cached teachers"
    ),
    "deit_tiny_demo": "DeiT: distillation token, hard and soft labels",
    "byot_demo": 'Self-distillation ("be your own teacher")',
    "supervised_demo": "Supervised training, softmax and sigmoid loss",
}
"""Demo -> its row of README's table of systems; the others belong to FAMILY."""

FAMILY = (
    "iBOT, DINOv2, MSN, I-JEPA, BYOL, SimSiam, SimCLR, MoCo v2 and v3, SupCon, SwAV, Barlow Twins, VICReg, LeJEPA, MAE, SimMIM, "
    "CAPI"
)


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.systems(ROWS.get(n, FAMILY))) for n in DEMOS])
def test_trains_and_is_evaluated(name: str, tmp_path: Path) -> None:
    config = selfsup.load_config(name, ["steps=3", "workers=0", "tensorboard=false", "log_every=1"])
    selfsup.train(config, out=tmp_path / "run", quiet=True)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(line["health"]["state"] == "ok" for line in lines)
    knn.run(str(tmp_path / "run"), ["data=demo:val", "workers=0"], tmp_path / "knn.json")
    found = json.loads((tmp_path / "knn.json").read_text())
    assert found["metrics"]["top1"] > 0.35  # ten classes; random features of these images have more


def test_bundled_teacher(tmp_path: Path) -> None:
    """`teacher=demo` tells the classes of the bundled val images as its run did: 89.9 %."""
    folder = Path(selfsup.__file__).parent / "data" / "fashion" / "teacher"
    out = tmp_path / "classify.json"
    classify(str(folder), ["data=demo:val", "workers=0"], out, open_run=load_classifiers)
    assert json.loads(out.read_text())["metrics"]["top1"] == pytest.approx(0.8985, abs=0.003)
