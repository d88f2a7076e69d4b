"""Classifiers as folders: bare timm gives their logits, bit for bit; the same weights give the same bytes."""

import json
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import selfsup
from selfsup import UserError
from selfsup.backbones import create_backbone, export_timm
from selfsup.classifier import Classifier, NotAsTimm, export_classifier, has_classifier, load_classifier
from selfsup.config import BackboneConfig
from tests.backbones.conftest import make
from tests.methods.tiny import tiny_config, write_images

NAMES = ["cat", "dog", "fish"]


def classifier(kind: str, **options: object) -> Classifier:
    backbone = make(kind, **options)
    torch.manual_seed(1)
    return Classifier(backbone, nn.Linear(backbone.embed_dim, len(NAMES)), dropout=0.1).eval()


def logits(module: nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return module.eval()(images)


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize(
    "kind", ["vit", "vit_avg", "registers", "eva", "swin", "xcit", "convnext", "resnet", "mobilenet"]
)
def test_bare_timm_gives_the_same_bits(kind: str, tmp_path: Path) -> None:
    module = classifier(kind, drop_path_rate=0.1) if kind == "vit" else classifier(kind)
    export_classifier(module, tmp_path / "out", NAMES)
    bare = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    images = torch.randn(3, 3, *module.backbone.image_size)
    expected = logits(module, images)
    assert expected.shape == (3, 3)
    assert torch.equal(logits(bare, images), expected)
    assert tuple(bare.pretrained_cfg["label_names"]) == tuple(NAMES)
    loaded = load_classifier(tmp_path / "out")
    assert torch.equal(logits(loaded.module, images), expected)
    assert (loaded.classes, loaded.label_names, loaded.size) == (3, NAMES, module.backbone.input_size)
    assert loaded.mean == module.backbone.mean and loaded.std == module.backbone.std


def test_transformers_reads_the_same_folder(tmp_path: Path) -> None:
    from transformers import AutoModelForImageClassification

    module = classifier("vit")
    export_classifier(module, tmp_path, NAMES)
    wrapped = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    images = torch.randn(3, 3, *module.backbone.image_size)
    with torch.no_grad():
        assert torch.equal(wrapped(images).logits, logits(module, images))
    assert [wrapped.config.id2label[i] for i in range(len(NAMES))] == list(NAMES)


def test_a_head_that_timm_writes_as_a_convolution(tmp_path: Path) -> None:
    """ResNetV2's is one over a map of one cell: the same up to the order of sums."""
    options = {"layers": [1, 1], "channels": [32, 64], "stem_chs": 16, "norm_layer": "groupnorm1"}
    config = BackboneConfig(name="resnetv2_50", in_chans=1, **options)
    backbone = create_backbone(config, mean=(0.5,), std=(0.25,), input_size=28)
    module = Classifier(backbone, nn.Linear(64, 3))
    export_classifier(module, tmp_path)
    bare = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    images = torch.randn(4, 1, 28, 28)
    torch.testing.assert_close(logits(bare, images), logits(module, images), rtol=1e-5, atol=1e-6)
    assert load_classifier(tmp_path).in_chans == 1


def test_identical_weights_give_identical_files(tmp_path: Path) -> None:
    """Whatever the folder, the mode, the precision; another head gives others."""
    first, second = classifier("vit"), classifier("vit", drop_path_rate=0.3).train()
    export_classifier(first, tmp_path / "a", NAMES)
    export_classifier(second, tmp_path / "deep" / "b", NAMES)
    export_classifier(first.double(), tmp_path / "c", NAMES)
    assert files(tmp_path / "a") == files(tmp_path / "deep" / "b") == files(tmp_path / "c")
    assert second.training
    with torch.no_grad():
        first.head.bias.add_(1)
    export_classifier(first, tmp_path / "c", NAMES)
    assert files(tmp_path / "a")["model.safetensors"] != files(tmp_path / "c")["model.safetensors"]
    assert files(tmp_path / "a")["config.json"] == files(tmp_path / "c")["config.json"]


def test_distilled_heads(tmp_path: Path) -> None:
    """timm's model with two heads takes two linear layers, and averages them."""
    backbone = make("distilled")

    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = backbone
            self.head, self.head_dist = nn.Linear(48, 3), nn.Linear(48, 3)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            tokens = self.backbone.model.forward_features(images)
            return (self.head(tokens[:, 0]) + self.head_dist(tokens[:, 1])) / 2

    module = TwoHeads()
    export_classifier(module, tmp_path)
    bare = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(logits(bare, images), logits(module, images))
    with pytest.raises(NotAsTimm, match="head_dist"):
        export_classifier(Classifier(backbone, nn.Linear(48, 3)), tmp_path)


def test_what_is_no_timm_model(tmp_path: Path) -> None:
    """Refused with the reason, and nothing is written."""
    out = tmp_path / "out"
    config = BackboneConfig(name="levit_128s")  # its head is a batch norm and a linear layer
    levit = create_backbone(config, mean=(0.5,) * 3, std=(0.25,) * 3, input_size=224)
    with pytest.raises(NotAsTimm, match="levit_128s"):
        export_classifier(Classifier(levit, nn.Linear(levit.embed_dim, 3)), out)
    vit = make("vit")
    deep = nn.Sequential(nn.Linear(48, 8), nn.Linear(8, 3))
    with pytest.raises(NotAsTimm, match="one linear head"):
        export_classifier(Classifier(vit, deep), out)
    with pytest.raises(NotAsTimm, match="one linear head"):
        export_classifier(nn.Linear(3, 3), out)

    class Scaled(Classifier):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(images)

    with pytest.raises(NotAsTimm, match="computes something else"):
        export_classifier(Scaled(vit, nn.Linear(48, 3)), out)
    assert not out.exists()


def test_folders_without_a_classifier(tmp_path: Path) -> None:
    export_timm(make("vit"), tmp_path / "backbone")
    assert not has_classifier(tmp_path / "backbone") and not has_classifier(tmp_path / "nothing")
    with pytest.raises(UserError, match="without a classifier; use selfsup eval linear"):
        load_classifier(tmp_path / "backbone")
    export_classifier(classifier("vit"), tmp_path / "classifier")
    assert has_classifier(tmp_path / "classifier")
    path = tmp_path / "classifier" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_classes": 7}))
    with pytest.raises(UserError, match="does not take its options and weights"):
        load_classifier(tmp_path / "classifier")


def test_activation_is_recorded(tmp_path: Path) -> None:
    module = classifier("vit")
    module.activation = "sigmoid"
    export_classifier(module, tmp_path, ["too", "few"])
    loaded = load_classifier(tmp_path)
    assert loaded.activation == "sigmoid" and loaded.label_names is None


def test_a_run_leaves_its_classifier(tmp_path: Path) -> None:
    """RUN/classifier is the averaged classifier with the names of the class folders; DINO leaves none."""
    images = write_images(tmp_path / "images", classes=4)
    run = tmp_path / "run"
    config = tiny_config("supervised", f"data={images}", "precision=fp32", "steps=3")
    selfsup.train(config, out=run, quiet=True)
    from selfsup.methods.load import load_classifiers

    trained = load_classifiers(run)
    assert list(trained.classifiers) == ["ema", "head"] and trained.step == 3
    x = torch.randn(5, 3, 32, 32)
    bare = timm.create_model(f"local-dir:{run / 'classifier'}", pretrained=True)
    assert torch.equal(logits(bare, x), logits(trained.classifiers["ema"], x))
    assert not torch.equal(logits(bare, x), logits(trained.classifiers["head"], x))
    assert list(bare.pretrained_cfg["label_names"]) == [f"class_{i}" for i in range(4)]
    backbone = timm.create_model(f"local-dir:{run / 'backbone'}", pretrained=True)
    assert torch.equal(logits(backbone, x), bare.forward_head(bare.forward_features(x), pre_logits=True))

    selfsup.train(tiny_config("dino", f"data={images}", "steps=2"), out=tmp_path / "dino", quiet=True)
    assert not (tmp_path / "dino" / "classifier").exists()
    assert load_classifiers(tmp_path / "dino").classifiers == {}
    with pytest.raises(UserError, match="not a run folder"):
        load_classifiers(tmp_path)
