"""Distillation: every loss gets what it should from both networks, several students share one teacher, and what is refused."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import selfsup
from selfsup import UserError, load_backbone, methods
from selfsup.config import Config, load
from selfsup.data.sources import open_source
from selfsup.log import read_metrics
from selfsup.losses import contrastive, hints, logits, relations
from selfsup.methods.contract import ViewBatch
from selfsup.methods.distill import Distill
from selfsup.methods.load import load_classifiers
from tests.methods.tiny import ONE_VIEW, SECOND_STUDENT, TINY_RUN, tiny_config, tiny_teacher, write_images

TEACHER = "teacher=tests.methods.tiny:tiny_teacher"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"), classes=4)


def config_of(losses: str, *overrides: str, classes: int | None = 4) -> Config:
    given = [f"data.classes={classes}"] if classes else []
    options = [*TINY_RUN, "method=distill", *ONE_VIEW, f"method.losses={losses}", *given, *overrides]
    return methods.complete(load(None, options))


def made(losses: str, *overrides: str, teacher: nn.Module | None = None, **more: Any) -> Distill:
    given = [] if teacher is not None or any(o.startswith("teacher=") for o in overrides) else [TEACHER]
    return methods.create(config_of(losses, *given, *overrides, **more), teacher).train()


def batch_of(views: int = 1, size: int = 8, local: int = 0) -> ViewBatch:
    g = torch.Generator().manual_seed(0)
    images = [torch.randn(views, size, 3, 32, 32, generator=g)]
    images += [torch.randn(local, size, 3, 16, 16, generator=g)] if local else []
    labels = torch.arange(size) % 4
    return ViewBatch(images, torch.arange(size), labels, torch.arange(size), step=5, global_batch=size)


def refusal(losses: str, *overrides: str, **more: Any) -> str:
    with pytest.raises(UserError) as caught:
        made(losses, *overrides, **more)
    return str(caught.value)


# -------------------------------------------------------------------------------------------------------- the losses


def test_each_loss_is_of_the_right_outputs() -> None:
    """Computed again here from both networks' own features, without `Outputs` or `Terms`."""
    names = ["ce", "soft", "hard", "dkd", "dist", "hint", "at", "sp", "rkd_distance", "rkd_angle", "regression"]
    names += ["patch_cosine", "crd"]
    layers = ["method.layers=[0]", "method.teacher_layers=[layer2]", "method.temperature=3", "method.crd_dim=16"]
    method = made(f"{{{', '.join(f'{n}: 0.5' for n in names)}}}", *layers)
    batch = batch_of()
    out = method(batch, {})
    x, y = batch.images[0][0], batch.labels
    net, p = method.student, method.terms.projectors
    teacher, seen = method.frozen.net.backbone, method.frozen.prepare(x)
    ours, z = net.backbone(x), net(x)
    (map_s,) = net.backbone.feature_maps(x, [0], norm=False)
    with torch.no_grad():
        r, (map_t,) = teacher.model(seen), teacher.feature_maps(seen, [2], norm=False)
        pooled = teacher.model.forward_head(teacher.model.forward_features(seen), pre_logits=True)
        last = teacher.model.forward_features(seen)  # [B, 32, 1, 1]
    assert map_t.shape[2:] == map_s.shape[2:] == (4, 4) and last.shape[2:] == (1, 1)
    small = ours.patches.mean(dim=(2, 3), keepdim=True)
    expected = {
        "ce": F.cross_entropy(z, y),
        "soft": logits.soft_distillation(z, r, 3),
        "hard": F.cross_entropy(z, r.argmax(-1)),
        "dkd": logits.decoupled_distillation(z, r, y),
        "dist": logits.dist_loss(z, r),
        "hint": F.mse_loss(p["hint0"](map_s), map_t),
        "at": hints.attention_transfer(map_s, map_t),
        "sp": relations.similarity_preserving(map_s, map_t),
        "rkd_distance": relations.rkd_distance(ours.pooled, pooled),
        "rkd_angle": relations.rkd_angle(ours.pooled, pooled),
        "crd": contrastive.crd_in_batch(
            F.normalize(p["crd"](ours.pooled), dim=-1), F.normalize(p["crd_teacher"](pooled), dim=-1)
        ),
    }
    for name, value in expected.items():
        torch.testing.assert_close(
            out[f"loss/{name}"], value.detach(), rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
    # a grid of 4x4 against one of 1x1: ours comes down to theirs, by an average; a 1x1 convolution may come before it
    projected = hints.to_grid(p["patch_cosine"](ours.patches), (1, 1))
    assert projected.shape == (8, 32, 1, 1) and small.shape[2:] == (1, 1)
    torch.testing.assert_close(
        out["loss/patch_cosine"], 1 - F.cosine_similarity(projected[..., 0, 0], last[..., 0, 0]).mean().detach()
    )
    parts = torch.stack([out[f"loss/{name}"] for name in names])
    torch.testing.assert_close(out["loss"].detach(), 0.5 * parts.sum())


@pytest.mark.parametrize("patch", [14, 16])
def test_patches_of_other_sizes(patch: int) -> None:
    """A ViT of patch 8 learns from one of patch 14 or 16, CLS and patches, with its own width."""
    import timm

    from selfsup.backbones.create import wrap

    size = 2 * patch
    model = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, img_size=size, patch_size=patch, embed_dim=48, depth=1, num_heads=2
    )
    values = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "input_size": size, "pos_interp": "timm"}
    teacher = wrap(model, "vit_tiny_patch16_224", {}, **values)
    method = made("{cls_cosine: 1, patch_cosine: 1, regression: 1}", teacher=teacher, classes=None)
    out = method(batch_of(), {})
    out["loss"].backward()
    assert method.student.head is None and method.classifiers() == {}
    assert {n: tuple(m.weight.shape[:2]) for n, m in method.terms.projectors.items()} == {
        "cls_cosine": (48, 32),
        "patch_cosine": (48, 32),
        "regression": (48, 32),
    }
    assert all(p.grad is not None for p in method.parameters() if p.requires_grad)


def test_convnet_learns_from_vit_and_the_other_way_round() -> None:
    import timm

    from selfsup.backbones.create import wrap

    vit = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **vit)
    values = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "input_size": 32, "pos_interp": "timm"}
    teacher = wrap(model, "vit_tiny_patch16_224", vit, **values)
    config = config_of("{hint: 1, at: 1}", "method.layers=[layer1, layer2]", "method.teacher_layers=[blocks.0, 2]")
    convnet = selfsup.config.BackboneConfig(name="resnet10t", channels=[8, 16, 16, 32], stem_width=8)
    method = methods.create(config.model_copy(update={"backbone": convnet}), teacher).train()
    assert {n: tuple(m.weight.shape) for n, m in method.terms.projectors.items()} == {
        "hint0": (48, 8, 1, 1),
        "hint1": (48, 16, 1, 1),
    }
    assert torch.isfinite(method(batch_of(), {})["loss"])


def test_prototypes_of_a_dino_teacher(images: Path, tmp_path: Path) -> None:
    """Cross-entropy between the student's head on all views and the teacher's distribution of global ones."""
    selfsup.train(tiny_config("dino", f"data={images}", "precision=fp32", "steps=2"), out=tmp_path / "run", quiet=True)
    options = ["views.global.count=2", "views.global.blur=0", "views.global.solarize=0", "method.hidden_dim=32"]
    method = made("{prototypes: 1}", f"teacher={tmp_path / 'run'}", *options, "method.bottleneck_dim=8", classes=None)
    assert [v.kind for v in method.views()] == ["global"] * 2 + ["local"] * 3
    batch = batch_of(views=2, local=3)
    out = method(batch, {})
    out["loss"].backward()
    assert all(p.grad is not None for p in method.student.parameters())

    with torch.no_grad():
        t = method.frozen.net(batch.images[0].flatten(0, 1), ()).prototypes.unflatten(0, (2, 8))
        q = torch.softmax(t / 0.04, -1)
        head, embed = method.terms.projectors["prototypes"], method.student.backbone
        z = [head(embed(x).pooled) for x in [*batch.images[0], *batch.images[1]]]
        terms = [
            -(q[a] * torch.log_softmax(z[b] / 0.1, -1)).sum(-1).mean() for a in range(2) for b in range(5)
        ]  # also of the same view
    torch.testing.assert_close(out["loss"].detach(), torch.stack(terms).mean(), rtol=1e-4, atol=1e-5)


def test_local_views_are_made_for_prototypes_alone() -> None:
    assert [v.kind for v in made("{soft: 1}").views()] == ["global"]


def test_mixed_images_reach_both(images: Path) -> None:
    """Student and teacher see the same mixed images; labels are mixed as they are."""
    method = made("{ce: 1, soft: 1}", "mix=mixup", "mix.group=4")
    seen: dict[str, torch.Tensor] = {}
    method.student.backbone.register_forward_pre_hook(lambda _m, a: seen.update(student=a[0]))
    method.student.backbone.shortcuts = frozenset()
    prepare = method.frozen.prepare
    method.frozen.prepare = lambda x: seen.update(teacher=x) or prepare(x)  # type: ignore[method-assign]
    batch = batch_of()
    out = method(batch, {})
    assert torch.equal(seen["student"], seen["teacher"]) and not torch.equal(seen["student"], batch.images[0][0])
    _, targets = method.mixer(batch.images[0], batch.labels, batch.positions, 5, lambda y: F.one_hot(y, 4).float())
    z = method.student(seen["student"])
    torch.testing.assert_close(out["loss/ce"], F.cross_entropy(z, targets).detach())


# -------------------------------------------------------------------------------------------------- several students


class Counted(nn.Module):
    """Counts its calls, and the images in them."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.calls = tiny_teacher().model, 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.net(images)


def test_several_students_ask_once(images: Path, tmp_path: Path) -> None:
    """One forward of the teacher a step; each student is exported, evaluated and in the checkpoint; the first is as alone."""
    second = SECOND_STUDENT.replace("layers: [0, 0], ", "")
    options = [*TINY_RUN, "method=distill", *ONE_VIEW, "method.losses={soft: 1}", f"data={images}", "precision=fp32"]
    options += ["steps=4", "eval.every=4"]
    evaluated: list[str] = []
    classified: list[list[str]] = []
    runs = {}
    for name, more in (("both", [second]), ("alone", [])):
        teacher = Counted()
        config = load(None, [*options, *more])
        made = methods.create(
            methods.complete(config), Counted()
        )  # a blank image to learn shapes, another what it gives
        before = made.frozen.net.module.calls
        selfsup.train(
            config,
            out=tmp_path / name,
            teacher=teacher,
            evaluate=lambda backbone, step: evaluated.append(backbone.name) or {"width": float(backbone.embed_dim)},
            classify=lambda found, step: classified.append(list(found)) or {},
            quiet=True,
        )
        assert teacher.calls == before + 4
        runs[name] = read_metrics(tmp_path / name / "metrics.jsonl")
    assert classified == [["head", "small"], ["head"]]
    assert runs["both"][-1]["eval"] == {"width": 32.0, "small/width": 24.0}
    assert [a["loss/soft"] for a in runs["both"][:1]] == [b["loss/soft"] for b in runs["alone"][:1]]
    assert all(a["loss"] == pytest.approx(a["loss/soft"] + a["loss/small/soft"], rel=1e-6) for a in runs["both"])
    assert load_backbone(tmp_path / "both" / "backbones" / "small").embed_dim == 24
    assert load_backbone(tmp_path / "both").embed_dim == 32
    from safetensors import safe_open

    with safe_open(tmp_path / "both" / "checkpoints" / "step_00000004" / "model.safetensors", "pt") as file:
        roles = {key.partition(".")[0] for key in file.keys()}  # noqa: SIM118
    assert roles == {"student", "student_2", "teacher_sha256"}


def test_evaluated_without_the_teacher(images: Path, tmp_path: Path) -> None:
    """A run's classifiers come from its checkpoint alone, whatever became of the teacher; they are those of the method."""
    config = tiny_config("distill", f"data={images}", "precision=fp32", "steps=2")
    found: dict[str, torch.Tensor] = {}
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def classify(classifiers: dict[str, nn.Module], step: int) -> dict[str, float]:
        with torch.no_grad():
            found.update({name: copy.deepcopy(module).eval()(x) for name, module in classifiers.items()})
        return {}

    config = config.model_copy(
        update={"teacher": selfsup.config.TeacherConfig(), "eval": config.eval.model_copy(update={"every": 2})}
    )
    selfsup.train(config, out=tmp_path / "run", teacher=tiny_teacher(), classify=classify, quiet=True)
    trained = load_classifiers(tmp_path / "run").classifiers
    assert list(trained) == list(found) == ["ema", "head", "small"]
    with torch.no_grad():
        assert all(torch.equal(module(x), found[name]) for name, module in trained.items())


def test_average_is_exported() -> None:
    """`ema`: an average of each student, evaluated and exported in its place; it follows by the momentum."""
    method = made("{ce: 1, soft: 1}", "method.ema=0.9", SECOND_STUDENT.replace("layers: [0, 0], ", ""))
    assert list(method.classifiers()) == ["ema", "head", "small"]
    assert list(method.backbones()) == ["student", "teacher", "student_2", "teacher_2"]
    with torch.no_grad():
        for p in method.parameters():
            p.add_(1.0 if p.requires_grad else 0.0)
    before = method.teacher.head.weight.clone()
    s = {name: f(50) for name, f in method.schedules(None).items()}  # type: ignore[arg-type]
    method.after_step(s, torch.ones(()))
    torch.testing.assert_close(method.teacher.head.weight, 0.9 * before + 0.1 * method.student.head.weight)
    assert torch.equal(method.export().model.pos_embed, method.teacher.backbone.model.pos_embed)
    assert torch.equal(method.further()["small"].model.pos_embed, method.teacher_2.backbone.model.pos_embed)


# ----------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("losses", "overrides", "message"),
    [
        ("{soft: 0}", [], "method.losses: all weights are 0"),
        (
            "{hint: 1}",
            ["method.layers=nosuch"],
            "method.layers=nosuch: vit_tiny_patch16_224 has no layer 'nosuch'; it has 0 (blocks.0), 1",
        ),
        ("{soft: 1}", ["method.layers=nosuch"], "method.layers=nosuch"),
        (
            "{hint: 1}",
            ["method.layers=[0, 7]", "method.teacher_layers=[0, 1]"],
            "layers of vit_tiny_patch16_224 are 0 (blocks.0), 1 (blocks.1)",
        ),
        (
            "{hint: 1}",
            ["method.teacher_layers=layer9"],
            "method.teacher_layers=layer9: resnet10t has no layer 'layer9'; it has 0 (act1)",
        ),
        ("{hint: 1}", ["method.layers=[0, 1]"], "2 layers for 1 of method.teacher_layers"),
        (
            "{at: 1}",
            [],
            "method.losses.at: layers, teacher_layers: pair 0 have grids of 4x4 (student) and 1x1 (teacher)",
        ),
        ("{cls_cosine: 1}", [], "gives no CLS token, which method.losses.cls_cosine needs"),
        (
            "{prototypes: 1}",
            ["views.global.count=2"],
            "gives no prototypes, which method.losses.prototypes needs; give a run of",
        ),
        (
            "{rkd_angle: 1}",
            ["global_batch=2"],
            "method.losses.rkd_angle compares the images of a micro-batch, and there is 2",
        ),
        ("{soft: 1}", ["mix=mixup", "teacher.cache=x"], "mix=mixup with teacher.cache=x"),
        ("{ce: 1, dkd: 1}", ["mix=mixup"], "mix=mixup with method.losses.dkd"),
        (
            "{dist: 1}",
            ["teacher.cache=x", "teacher.cache_topk=2"],
            "teacher.cache_topk=2: method.losses.dist needs all",
        ),
        ("{soft: 1}", ["views.global.count=0"], "views.global.count=0: the teacher sees global views"),
    ],
)
def test_refused(losses: str, overrides: list[str], message: str) -> None:
    assert message in refusal(losses, *overrides)


def test_other_classes() -> None:
    text = refusal("{soft: 1}", classes=5)
    assert "tells 4 classes, the data have 5, and method.losses.soft needs the same" in text
    made("{ce: 1, rkd_distance: 1}", classes=5)  # features do not care


def test_labels_are_needed_where_a_loss_needs_them(tmp_path: Path) -> None:
    """No labels: ce and dkd say so, others learn; some labels: ce takes those beside another loss."""
    text = refusal("{ce: 1, soft: 1}", classes=None)
    assert text.startswith("method.losses.ce learns from labels, and data.path=demo has none")
    assert made("{soft: 1}", classes=None).student.head.out_features == 4
    source = open_source(str(write_images(tmp_path / "a", 8)), channels=3)
    for losses in ("{ce: 1, soft: 1}", "{dkd: 1}"):
        with pytest.raises(UserError, match=r"learns from labels, and 8 of 8 images of data.path=demo have none"):
            made(losses).bind(source, [])
    made("{soft: 1}").bind(source, [])


def test_unlabelled_images_add_nothing_to_ce() -> None:
    method = made("{ce: 1, soft: 1}")
    batch = batch_of()
    batch.labels[4:] = -1
    z = method.student(batch.images[0][0])
    expected = F.cross_entropy(z[:4], batch.labels[:4], reduction="sum") / 8
    torch.testing.assert_close(method(batch, {})["loss/ce"], expected.detach())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method.losses={sof: 1}"], "unknown key 'method.losses.sof'; did you mean method.losses.soft?"),
        (["method.losses={soft: -1}"], "method.losses.soft=-1"),
        (["method.students=[{name: head, backbone: resnet18}]"], "students"),
        (["method.students=[{name: a, backbone: resnet18}, {name: a, backbone: resnet18}]"], "two of the names a, a"),
        (["teacher.cache_epochs=2", "method.losses={soft: 1}"], "give teacher.cache=FOLDER"),
    ],
)
def test_refused_by_the_schema(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        methods.complete(load(None, [*TINY_RUN, "method=distill", TEACHER, *overrides]))
    assert message in str(caught.value)


def test_losses_replace_the_default() -> None:
    options = methods.complete(load(None, ["method=distill", "method.losses={rkd_angle: 2}"])).method.options
    assert {k: v for k, v in options["losses"].items() if v} == {"rkd_angle": 2.0}
