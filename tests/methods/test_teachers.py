"""Frozen teachers: where they come from, what they see, and that nothing about them ever moves."""

import shutil
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import save_for_hf
from torch import nn

import selfsup
from selfsup import UserError, methods
from selfsup.backbones import export_timm
from selfsup.config import Config, load
from selfsup.methods.load import load_classifiers
from selfsup.methods.outputs import Wanted
from selfsup.methods.teacher_sources import open_teacher
from selfsup.methods.teachers import ForeignNet, FrozenNet, Teacher, weights_sha256
from tests.methods.tiny import ONE_VIEW, TINY_RUN, tiny_config, tiny_teacher, write_images

ALL = Wanted(logits=True, pooled=True, patches=True)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"), classes=4)


def config_of(*overrides: str) -> Config:
    return load(None, [*TINY_RUN, "method=distill", *ONE_VIEW, *overrides])


def noise(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def normalised(images: torch.Tensor, mean, std) -> torch.Tensor:
    return (images - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


# ------------------------------------------------------------------------------------------------------- what it sees


def teacher_for(net: nn.Module, *, mean, std, size=None, student_mean, student_std) -> Teacher:
    options = {"student_mean": student_mean, "student_std": student_std, "view_size": 8}
    return Teacher("it", ForeignNet(net), mean=mean, std=std, size=size, **options)


class Looks(nn.Module):
    """Gives its images."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images


def test_other_values() -> None:
    x, ours, own = noise(2, 3, 8, 8), ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)), ((0.1, 0.2, 0.6), (0.5, 0.6, 0.7))
    teacher = teacher_for(Looks(), mean=own[0], std=own[1], student_mean=ours[0], student_std=ours[1])
    torch.testing.assert_close(teacher.prepare(normalised(x, *ours)), normalised(x, *own))


def test_same_values_are_left_alone() -> None:
    values = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
    teacher = teacher_for(Looks(), **values, student_mean=values["mean"], student_std=values["std"])
    x = noise(2, 3, 8, 8)
    assert teacher.prepare(x) is x


@pytest.mark.parametrize("size", [4, 12])
def test_other_size_is_antialiased(size: int) -> None:
    """As if the image in [0, 1] had been resized, then normalised: the same geometry."""
    x, ours, own = noise(2, 3, 8, 8), ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)), ((0.1, 0.2, 0.6), (0.5, 0.6, 0.7))
    teacher = teacher_for(
        Looks(), mean=own[0], std=own[1], size=(size, size), student_mean=ours[0], student_std=ours[1]
    )
    resized = F.interpolate(x, size=(size, size), mode="bicubic", antialias=True)
    torch.testing.assert_close(teacher.prepare(normalised(x, *ours)), normalised(resized, *own), rtol=1e-5, atol=1e-5)


def test_grey_and_colour() -> None:
    x = noise(2, 1, 8, 8)
    colour = teacher_for(Looks(), mean=(0.1, 0.2, 0.3), std=(1, 1, 1), student_mean=(0.5,), student_std=(0.25,))
    seen = colour.prepare(normalised(x, (0.5,), (0.25,)))
    torch.testing.assert_close(seen, normalised(x.expand(-1, 3, -1, -1), (0.1, 0.2, 0.3), (1, 1, 1)))
    x = noise(2, 3, 8, 8)
    grey = teacher_for(Looks(), mean=(0.0,), std=(1.0,), student_mean=(0.5, 0.5, 0.5), student_std=(1, 1, 1))
    expected = 0.299 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]
    torch.testing.assert_close(grey.prepare(x - 0.5), expected)


def test_four_channels_are_not_converted() -> None:
    with pytest.raises(UserError, match="takes images of 3 channels, the student's have 4"):
        teacher_for(Looks(), mean=(0.5,) * 3, std=(1,) * 3, student_mean=(0.5,) * 4, student_std=(1,) * 4)


# ---------------------------------------------------------------------------------------------------- where it is from


def exported(tmp_path: Path, model: nn.Module) -> Path:
    """A folder of timm's with its classifier."""
    save_for_hf(
        model, str(tmp_path / "teacher"), safe_serialization=True, model_args={"img_size": 32, "patch_size": 8, **VIT}
    )
    return tmp_path / "teacher"


VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2}


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_folder_with_a_classifier(tmp_path: Path, name: str) -> None:
    """Its logits are bare timm's, bit for bit; of two heads the mean."""
    model = timm.create_model(name, num_classes=5, img_size=32, patch_size=8, **VIT).eval()
    teacher = open_teacher(config_of(f"teacher={exported(tmp_path, model)}"))
    cfg, x = model.pretrained_cfg, noise(3, 3, 32, 32)
    assert (teacher.classes, teacher.mean, teacher.size) == (5, cfg["mean"], (32, 32))
    seen = teacher.prepare(normalised(x, *ours()))
    found = teacher(normalised(x, *ours()), ALL)
    with torch.no_grad():
        assert torch.equal(found.logits, model(seen))
        assert torch.equal(found.pooled, model.forward_head(model.forward_features(seen), pre_logits=True))


def ours() -> tuple:
    config = config_of()
    return config.mean, config.std


def test_backbone_folder_has_no_logits(tmp_path: Path) -> None:
    backbone = selfsup.backbones.create_backbone(config_of().backbone, mean=(0.5,) * 3, std=(0.5,) * 3)
    export_timm(backbone, tmp_path / "backbone")
    teacher = open_teacher(config_of(f"teacher={tmp_path / 'backbone'}"))
    assert teacher.gives == {"pooled", "cls", "patches"} and teacher.classes is None
    x = noise(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(teacher.net.backbone(x).pooled, backbone.eval()(x).pooled)
    with pytest.raises(UserError, match=r"gives no logits, which method.losses.soft needs; give a classifier"):
        teacher.check(Wanted(logits=True), {"logits": "method.losses.soft"})


def test_layers_by_number_and_name() -> None:
    net = FrozenNet(tiny_teacher())
    assert net.numbers((0, -1, "layer2"), "method.teacher_layers") == (0, 4, 2)
    with pytest.raises(
        UserError,
        match=r"method.teacher_layers=nosuch: resnet10t has no layer 'nosuch'; it has 0 \(act1\), 1 \(layer1\)",
    ):
        net.numbers(("nosuch",), "method.teacher_layers")
    teacher = open_teacher(config_of("teacher=tests.methods.tiny:tiny_teacher"))
    maps = teacher(noise(2, 3, 32, 32), Wanted(layers=(3, 1))).maps
    expected = teacher.net.backbone.feature_maps(teacher.prepare(noise(2, 3, 32, 32)), (3, 1), norm=False)
    assert all(torch.equal(a, b) for a, b in zip(maps, expected, strict=True))


@pytest.fixture(scope="module")
def dino_run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dino") / "run"
    selfsup.train(tiny_config("dino", f"data={images}", "precision=fp32", "steps=3"), out=out, quiet=True)
    return out


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_prototypes_of_a_dino_run(dino_run: Path, role: str) -> None:
    """Logits of the run's own head less its centre; its temperature."""
    from safetensors.torch import load_file

    teacher = open_teacher(config_of(f"teacher={dino_run}" + ("@student" if role == "student" else "")))
    config = methods.complete(selfsup.config.load(str(dino_run / "config.yaml")))
    method = methods.create(config)
    method.load_state_dict(load_file(dino_run / "checkpoints" / "step_00000003" / "model.safetensors"))
    net = getattr(method, role).eval()
    x = noise(2, 3, 32, 32)
    with torch.no_grad():
        expected = net.head(net.backbone(x).pooled) - method.center
    torch.testing.assert_close(teacher(x, Wanted(prototypes=True)).prototypes, expected, rtol=1e-5, atol=1e-6)
    assert method.center.abs().max() > 0 and teacher.temperature == 0.04


@pytest.mark.parametrize("average", [True, False])
def test_head_of_a_supervised_run(images: Path, tmp_path: Path, average: bool) -> None:
    """From RUN/classifier, or, while there is none yet, from the newest checkpoint: the averaged weights, if there are any."""
    run, ema = tmp_path / "run", "method.ema=0.9" if average else "method.ema=null"
    options = [f"data={images}", "precision=fp32", "steps=2", ema, "method.consistency=0"]
    selfsup.train(tiny_config("supervised", *options), out=run, quiet=True)
    x, found = noise(3, 3, 32, 32), load_classifiers(run).classifiers
    with torch.no_grad():
        expected = {name: module(x) for name, module in found.items()}
    main = next(iter(expected.values()))
    asked = lambda target: open_teacher(config_of(f"teacher={target}"))(x, Wanted(logits=True)).logits  # noqa: E731
    assert torch.equal(asked(run), main)
    shutil.rmtree(run / "classifier")
    assert torch.equal(asked(run), main)
    assert torch.equal(asked(f"{run}@student"), expected["head"])
    assert torch.equal(asked(run / "checkpoints" / "step_00000002"), main)


def test_module_from_python() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 7), nn.Dropout(0.5)).train()
    teacher = open_teacher(config_of(), module)
    assert (teacher.classes, teacher.gives) == (7, {"logits"}) and not module.training
    x = noise(2, 3, 32, 32)
    assert torch.equal(teacher(x, Wanted(logits=True)).logits, module(x))  # the student's values, and no dropout


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("nosuch/folder", "no such file or folder, and timm has no such model"),
        ("vit_tiny_patch16_22", "did you mean vit_tiny_patch16_224?"),
        ("resnet10t.nosuch", "timm has no weights 'nosuch'"),
        ("resnet18", "a teacher without loaded weights: they could not be fetched"),  # tests are offline
        ("tests.methods.tiny:nosuch", "cannot be imported and called"),
        ("tests.methods.tiny:write_images", "cannot be imported and called"),
        ("runs/none@student", "no such run runs/none"),
    ],
)
def test_refused(target: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        open_teacher(config_of(f"teacher={target}"))
    assert str(caught.value).startswith("teacher=") and message in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "method=distill learns from a teacher and there is none; give teacher=RUN"),
        (["teacher=resnet18", "teacher.pretrained=false"], "a teacher without loaded weights teaches noise"),
        (["teacher=tests.methods.tiny:tiny_teacher", "teacher.mean=[0.5]", "teacher.std=[0.5]"], "teacher.mean"),
    ],
)
def test_refused_options(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_teacher(config_of(*overrides))


def test_folder_without_weights(tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5, img_size=32, patch_size=8, **VIT)
    folder = exported(tmp_path, model)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"config\.json without weights"):
        open_teacher(config_of(f"teacher={folder}"))


def test_a_module_that_gives_something_else() -> None:
    with pytest.raises(UserError, match="gives a tuple; logits"):
        open_teacher(config_of(), type("Odd", (nn.Module,), {"forward": lambda self, x: (x, x)})())
    with pytest.raises(UserError, match="fails on images"):
        open_teacher(config_of(), nn.Linear(5, 5))


def test_a_method_without_a_teacher_refuses_one() -> None:
    with pytest.raises(UserError, match="teacher=resnet18: method=dino learns from no other network"):
        methods.complete(tiny_config("dino", "teacher=resnet18"))
    with pytest.raises(UserError, match="teacher=Linear: method=dino learns from no other network"):
        methods.create(methods.complete(tiny_config("dino")), nn.Linear(2, 2))


# --------------------------------------------------------------------------------------------------- that it is frozen


@pytest.mark.parametrize("name", ["distill", "deit"])
def test_it_is_no_part_of_the_method_and_never_moves(images: Path, tmp_path: Path, name: str) -> None:
    """Not in the state, the parameters, the backbones; in eval mode whatever is called; not a bit of it changes."""
    teacher = tiny_teacher()
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    config = tiny_config(name, f"data={images}", "precision=fp32", "steps=3")
    config = config.model_copy(update={"teacher": selfsup.config.TeacherConfig()})
    method = methods.create(
        methods.complete(config.model_copy(update={"data": config.data.model_copy(update={"classes": 4})})), teacher
    ).train()
    assert method.frozen.net.backbone is teacher and not any(m.training for m in teacher.modules())
    assert not {p.data_ptr() for p in method.parameters()} & {p.data_ptr() for p in teacher.parameters()}
    assert not any(k.startswith("frozen") for k in method.state_dict()) and "teacher_sha256" in method.state_dict()
    assert all(b is not teacher for b in method.backbones().values())

    modes: list[bool] = []
    teacher.model.bn1.register_forward_hook(lambda m, *_: modes.append(m.training))
    selfsup.train(config, out=tmp_path / "run", teacher=teacher, quiet=True)
    assert len(modes) >= 3 and not any(modes)
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())


def test_it_goes_where_the_method_goes() -> None:
    method = methods.create(methods.complete(tiny_config("distill", "data.classes=4"))).double()
    assert next(method.frozen.net.parameters()).dtype == torch.float64
    assert method.frozen.prepare(noise(1, 3, 32, 32).double()).dtype == torch.float64


def test_a_resume_with_another_teacher_is_refused(images: Path, tmp_path: Path) -> None:
    config = tiny_config("distill", f"data={images}", "precision=fp32", "steps=4", "stop_at=2")
    with pytest.raises(selfsup.errors.EarlyStop):
        selfsup.train(config, out=tmp_path / "run", quiet=True)
    config = config.model_copy(update={"stop_at": None})
    with pytest.raises(UserError, match=r"teacher=.*its weights \(sha256 .*\) are not those that this run learns from"):
        selfsup.train(config, out=tmp_path / "run", resume=True, teacher=tiny_teacher(seed=1), quiet=True)
    selfsup.train(config, out=tmp_path / "run", resume=True, quiet=True)


def test_sha256_is_of_the_weights() -> None:
    a, b = tiny_teacher(), tiny_teacher()
    assert weights_sha256(a) == weights_sha256(b) != weights_sha256(tiny_teacher(seed=1))
    with torch.no_grad():
        b.model.bn1.running_mean[0].nextafter_(torch.tensor(9.0))
    assert weights_sha256(a) != weights_sha256(b)
