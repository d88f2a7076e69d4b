"""Each file in examples/, run as a person runs it, on real silhouettes; and the entry of torch.hub."""

import re
import runpy
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import selfsup
from tests.eval.conftest import CLASSES, DEMO

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def silhouettes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trousers and bags of the bundled photographs, and masks: 1 or 2 where there is cloth, 0 elsewhere."""
    folder = tmp_path_factory.mktemp("silhouettes")
    (folder / "images").mkdir()
    (folder / "masks").mkdir()
    with zipfile.ZipFile(DEMO) as archive:
        names = sorted(n for n in archive.namelist() if n.endswith(".png"))
        for label, kind in enumerate((CLASSES[0], CLASSES[2]), 1):
            for i, name in enumerate([n for n in names if n.split("/")[-2] == kind][:32]):
                target = folder / "images" / f"{i:03}-{kind}.png"
                target.write_bytes(archive.read(name))
                pixels = np.array(Image.open(target).convert("L"))
                Image.fromarray(((pixels > 24) * label).astype(np.uint8)).save(folder / "masks" / target.name)
    return folder


def example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, *words: object) -> str:
    """What it prints."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
    monkeypatch.syspath_prepend(str(EXAMPLES))  # as for `python examples/NAME`
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out


def figure(text: str) -> float:
    found = re.search(r"(?:mIoU|best box) (\d\.\d+)", text)
    assert found, text
    return float(found[1])


def test_all_of_them_are_tested_and_short() -> None:
    here = Path(__file__).read_text()
    files = sorted(EXAMPLES.glob("*.py"))
    assert len(files) == 4
    for path in files:
        assert f'"{path.name}"' in here and path.name in (EXAMPLES / "README.md").read_text()
        assert len(path.read_text().splitlines()) <= 120
    assert "main(*sys.argv[1:])" in (EXAMPLES / "segmentation.py").read_text()


def test_segmentation(run: Path, silhouettes: Path, monkeypatch, capsys) -> None:
    """A linear layer on the features of six steps of training finds the cloth; an untrained one does not."""
    trained = figure(example(monkeypatch, capsys, "segmentation.py", run, silhouettes))
    untrained = figure(example(monkeypatch, capsys, "segmentation.py", run, silhouettes, 0))
    assert trained > 0.5 and trained > untrained + 0.2, (trained, untrained)


@pytest.mark.slow
def test_detection(run: Path, silhouettes: Path, monkeypatch, capsys) -> None:
    trained = figure(example(monkeypatch, capsys, "detection.py", run, silhouettes, 40))
    assert trained > 0.5, trained


@pytest.mark.slow
def test_smp_decoder(run: Path, silhouettes: Path, monkeypatch, capsys) -> None:
    pytest.importorskip("segmentation_models_pytorch")
    trained = figure(example(monkeypatch, capsys, "smp_decoder.py", run / "backbone", silhouettes, 30))
    assert trained > 0.6, trained


def test_features(run: Path, silhouettes: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """Both files hold the same, and it is what the backbone gives."""
    parquet = pytest.importorskip("pyarrow.parquet")
    images = silhouettes / "images"
    said = example(monkeypatch, capsys, "features.py", run, images, tmp_path / "f.parquet")
    assert "64 images, 24 numbers each" in said
    example(monkeypatch, capsys, "features.py", run, images, tmp_path / "f.npy")
    array, names = np.load(tmp_path / "f.npy", allow_pickle=False), (tmp_path / "f.txt").read_text().split()
    table = parquet.read_table(tmp_path / "f.parquet")
    assert table["path"].to_pylist() == names == sorted(p.name for p in images.iterdir())
    np.testing.assert_array_equal(np.array(table["feature"].to_pylist(), dtype=np.float32), array)
    model = selfsup.load_backbone(run)
    pixels = np.array(Image.open(images / names[5]).convert("L"), dtype=np.float32)[None, None] / 255
    with torch.no_grad():
        expected = model((torch.from_numpy(pixels) - model.mean[0]) / model.std[0]).pooled
    np.testing.assert_allclose(array[5], expected[0].numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.systems("Export to timm, to transformers, to ONNX, to `torch.export`; torch.hub")
def test_torch_hub(run: Path, tmp_path: Path) -> None:
    """In a process of its own, from another folder, with the checkout's path alone."""
    code = (
        "import sys, torch\n"
        "model = torch.hub.load(sys.argv[1], 'backbone', sys.argv[2], source='local', trust_repo=True)\n"
        "assert 'Features' in type(model(torch.zeros(2, 1, 28, 28))).__name__ and not model.training\n"
        "print(tuple(model(torch.zeros(2, 1, 28, 28)).pooled.shape))\n"
    )
    words = [sys.executable, "-c", code, str(ROOT), str(run)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=100, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split("\n")[-2] == "(2, 24)"
