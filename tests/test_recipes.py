"""The built-in recipes: they load, their methods accept them, and they say what was published."""

import pytest

from selfsup import methods, schedules
from selfsup.config import dump, load, recipe_names, recipe_texts

IMAGENET = 1_281_167


def test_names() -> None:
    assert {"demo", "dino_vits16", "dino_vits16_smalldata", "dino_resnet50"} <= set(recipe_names())


@pytest.mark.parametrize("name", recipe_names())
def test_loads_completes_and_plans(name: str, tmp_path) -> None:
    config = methods.complete(load(name))
    path = tmp_path / "config.yaml"
    path.write_text(dump(config))
    again = load(str(path))
    assert again == config and methods.complete(again) == config
    length = schedules.plan(config, IMAGENET)
    values = schedules.evaluate(schedules.optimizer_schedules(config, length), length.steps // 2)
    assert values["lr"] > 0
    assert config.checkpoint.every <= length.steps


@pytest.mark.parametrize("name", recipe_names())
def test_first_line_says_what_it_is(name: str) -> None:
    first = recipe_texts()[name].splitlines()[0]
    assert first.startswith("# ") and len(first) > 20


def test_dino_vits16_is_the_published_recipe() -> None:
    """Caron et al., 2021, section 3.2 and the published code's README, boosted ViT-S: spelled out independently."""
    config = methods.complete(load("dino_vits16"))
    length = schedules.plan(config, IMAGENET)
    rate = schedules.optimizer_schedules(config, length)
    per_epoch = IMAGENET / 1024
    assert length.steps == pytest.approx(300 * per_epoch, abs=1)
    assert max(rate["lr"](s) for s in range(0, length.steps, 500)) <= 0.0005 * 1024 / 256
    warmup = round(10 * per_epoch)
    assert rate["lr"](warmup - 1) == pytest.approx(0.002)
    assert rate["lr"](0) == 0
    assert rate["lr"](length.steps) == pytest.approx(1e-6)
    assert (rate["wd"](0), rate["wd"](length.steps)) == pytest.approx((0.04, 0.4))
    assert config.optimizer.clip == 3.0 and config.optimizer.clip_mode == "parameter"
    assert config.views.global_.count == 2 and config.views.global_.size == 224
    assert config.views.local.count == 8 and config.views.local.size == 96
    assert config.views.global_.scale == (0.4, 1.0) and config.views.local.scale == (0.05, 0.4)
    assert config.views.global_.blur == (1.0, 0.1) and config.views.global_.solarize == (0.0, 0.2)
    assert config.views.local.blur == 0.5 and config.views.local.solarize == 0
    for crops in (config.views.global_, config.views.local):
        assert (crops.jitter, crops.grayscale, crops.hflip) == (0.8, 0.2, 0.5)
        assert (crops.brightness, crops.contrast, crops.saturation, crops.hue) == (0.4, 0.4, 0.2, 0.1)
    options = config.method.options
    assert options["out_dim"] == 65536 and options["norm_last_layer"] is False
    assert (options["warmup_teacher_temp"], options["teacher_temp"]) == (0.04, 0.07)
    assert options["momentum"] == 0.996 and options["student_temp"] == 0.1 and options["center_momentum"] == 0.9
    assert config.backbone.options["drop_path_rate"] == 0.1


def test_dino_resnet50_is_the_published_recipe() -> None:
    """The README's command for ResNet-50: sgd, lr 0.03, wd 1e-4, crops at 0.14, 100 epochs, 8 GPUs x 64."""
    config = methods.complete(load("dino_resnet50"))
    length = schedules.plan(config, IMAGENET)
    rate = schedules.optimizer_schedules(config, length)
    assert (config.backbone.name, config.optimizer.name, config.global_batch) == ("resnet50", "sgd", 512)
    assert length.steps == pytest.approx(100 * IMAGENET / 512, abs=1)
    assert rate["lr"](round(10 * IMAGENET / 512) - 1) == pytest.approx(0.06)
    assert (rate["wd"](0), rate["wd"](length.steps // 2)) == pytest.approx((1e-4, 1e-4))
    assert config.views.global_.scale == (0.14, 1.0) and config.views.local.scale == (0.05, 0.14)
    assert config.views.global_.blur == (1.0, 0.1) and config.views.local.count == 8


def test_distill_resnet50_is_the_published_recipe() -> None:
    """He et al., 2019, section 5.3 and table 6: T = 20, weights 1 and 1, on top of cosine decay and label smoothing."""
    config = methods.complete(load("distill_resnet50"))
    length = schedules.plan(config, IMAGENET)
    rate = schedules.optimizer_schedules(config, length)
    options = config.method.options
    assert {k: v for k, v in options["losses"].items() if v} == {"ce": 1.0, "soft": 1.0} and options[
        "temperature"
    ] == 20
    assert (options["label_smoothing"], options["smoothing_form"]) == (0.1, "others")
    assert config.backbone.name == "resnet50d" and str(config.teacher.path).startswith("resnet152d")
    assert length.steps == pytest.approx(120 * IMAGENET / 1024, abs=1)
    assert rate["lr"](round(5 * IMAGENET / 1024) - 1) == pytest.approx(0.4)
    assert rate["lr"](length.steps) == pytest.approx(0.0, abs=1e-9)


def test_deit_small_is_the_published_recipe() -> None:
    """Touvron et al., 2021, table 9 and main.py: 300 epochs of 1024, AdamW at 0.0005 x batch / 512, cosine from 5 epochs."""
    config = methods.complete(load("deit_small"))
    length = schedules.plan(config, IMAGENET)
    rate = schedules.optimizer_schedules(config, length)
    assert config.backbone.name == "deit_small_patch16_224" and config.backbone.options["drop_path_rate"] == 0.1
    assert length.steps == pytest.approx(300 * IMAGENET / 1024, abs=1)
    assert rate["lr"](round(5 * IMAGENET / 1024) - 1) == pytest.approx(0.0005 * 1024 / 512)
    assert rate["lr"](length.steps) == pytest.approx(1e-5)
    assert {rate["wd"](0), rate["wd"](length.steps)} == {0.05} and config.optimizer.clip is None
    assert (config.mix.name, config.mix.mixup_alpha, config.mix.cutmix_alpha, config.mix.switch) == (
        *("mixup+cutmix", 0.8, 1.0, 0.5),
    )
    crops = config.views.global_
    assert (crops.count, crops.size, crops.scale, crops.interpolation) == (1, 224, (0.08, 1.0), "bicubic")
    assert (crops.policy, crops.policy_ops, crops.policy_magnitude) == ("randaugment", 2, 9)
    assert (crops.erase, crops.erase_fill, crops.hflip, crops.jitter) == (0.25, "noise", 0.5, 0.0)
    options = config.method.options
    assert (options["label_smoothing"], options["smoothing_form"], options["ema"]) == (0.1, "all", 0.99996)
    assert options["loss"] == "softmax" and config.views.local.count == 0 and config.data.copies == 3


def test_resnet50_tricks_is_the_paper() -> None:
    """He et al., 2019: sections 2.1, 3.1, 5.1, 5.2 and 5.4, and each trick off again by its own key."""
    config = methods.complete(load("resnet50_tricks"))
    length = schedules.plan(config, IMAGENET)
    rate = schedules.optimizer_schedules(config, length)
    o, crops = config.optimizer, config.views.global_
    assert (o.name, o.nesterov, o.momentum, o.weight_decay, o.decay_all) == ("sgd", True, 0.9, 1e-4, False)
    assert rate["lr"](round(5 * IMAGENET / 1024) - 1) == pytest.approx(0.4)
    assert rate["lr"](length.steps) == 0 and length.steps == pytest.approx(200 * IMAGENET / 1024, abs=1)
    assert (config.mix.name, config.mix.mixup_alpha) == ("mixup", 0.2)
    assert (config.method.options["label_smoothing"], config.method.options["smoothing_form"]) == (0.1, "others")
    assert config.backbone.name == "resnet50d" and config.backbone.options["zero_init_last"] is True
    assert (crops.scale, crops.jitter, crops.brightness, crops.lighting) == ((0.08, 1.0), 1.0, 0.4, 0.1)
    step = ["optimizer.schedule=step", "optimizer.milestones=[30 epochs,60 epochs,90 epochs]"]
    off = ["mix=none", "method.label_smoothing=0", "backbone=resnet50", "optimizer.lr=0.1", "optimizer.warmup=0 epochs"]
    baseline = methods.complete(load("resnet50_tricks", [*off, *step, "global_batch=256", "epochs=120"]))
    length = schedules.plan(baseline, IMAGENET)
    rate = schedules.optimizer_schedules(baseline, length)
    epoch = IMAGENET / 256
    found = [rate["lr"](round(e * epoch)) for e in (0, 29, 31, 61, 91)]
    assert found == pytest.approx([0.1, 0.1, 0.01, 0.001, 0.0001])


def test_scaling_vit_is_the_paper() -> None:
    """Zhai et al., 2022: warm-up, constant, linear cool-down to zero; the head's decay a hundred times the trunk's."""
    config = methods.complete(load("scaling_vit"))
    length = schedules.plan(config, IMAGENET)
    rate = schedules.optimizer_schedules(config, length)
    assert rate["lr"](5_000) == pytest.approx(0.0004, rel=1e-3)
    assert [rate["lr"](s) for s in (10_000, 300_000, 449_999)] == pytest.approx([0.0008] * 3, rel=1e-3)
    assert rate["lr"](475_000) == pytest.approx(0.0004, rel=1e-3) and rate["lr"](500_000) == 0
    assert (rate["wd"](9), rate["wd_head"](9)) == (0.03, 3.0) and config.optimizer.name == "adafactor"
    assert config.backbone.options["global_pool"] == "map" and config.backbone.options["class_token"] is False
    assert (config.method.options["loss"], config.method.options["sum_classes"]) == ("sigmoid", True)


def test_byol_resnet50_is_the_published_recipe() -> None:
    """Grill et al., 2020, section 3.3 and table 6."""
    config = methods.complete(load("byol_resnet50"))
    length = schedules.plan(config, IMAGENET)
    rate = schedules.optimizer_schedules(config, length)
    assert (config.backbone.name, config.optimizer.name, config.global_batch) == ("resnet50", "lars", 4096)
    assert length.steps == pytest.approx(1000 * IMAGENET / 4096, abs=1)
    assert rate["lr"](round(10 * IMAGENET / 4096) - 1) == pytest.approx(0.2 * 4096 / 256)
    assert rate["lr"](length.steps) == pytest.approx(0, abs=1e-12) and rate["wd"](7) == 1.5e-6
    crops, options = config.views.global_, config.method.options
    assert (crops.count, crops.size, crops.scale, crops.blur, crops.solarize) == (
        *(2, 224, (0.08, 1.0), (1.0, 0.1), (0.0, 0.2)),
    )
    assert (options["hidden_dim"], options["out_dim"], options["momentum"]) == (4096, 256, 0.996)


CONTRASTIVE = {
    # recipe: (method, epochs, batch, optimizer, peak, warm-up in epochs, last rate, decay, smallest crop, jitter, options)
    "simclr_resnet50": (
        "simclr",
        1000,
        4096,
        "lars",
        4.8,
        10,
        0.0,
        1e-6,
        0.08,
        0.8,
        {"temperature": 0.1, "out_dim": 128},
    ),
    "supcon_resnet50": (
        "supcon",
        350,
        6144,
        "lars",
        9.6,
        12,
        0.0,
        1e-3,
        0.08,
        0.0,
        {"temperature": 0.1, "out_dim": 128},
    ),
    "moco_resnet50": (
        *("moco", 200, 256, "sgd", 0.03, 0, 0.0, 1e-4, 0.2, 0.8),
        {"temperature": 0.2, "queue_length": 65536, "momentum": 0.999, "out_dim": 128},
    ),
    "mocov3_vits16": (
        *("mocov3", 300, 1024, "adamw", 6e-4, 40, 0.0, 0.1, 0.2, 0.8),
        {"temperature": 0.2, "momentum": 0.99, "hidden_dim": 4096, "out_dim": 256, "freeze_patch_projection": True},
    ),
    "swav_resnet50": (
        *("swav", 800, 4096, "lars", 4.8, 10, 0.0048, 1e-6, 0.14, 0.8),
        {"prototypes": 3000, "epsilon": 0.05, "temperature": 0.1, "freeze_prototypes": "313 steps", "queue_length": 0},
    ),
}


@pytest.mark.parametrize("name", CONTRASTIVE)
def test_contrastive_recipes_are_the_published_ones(name: str) -> None:
    """Chen et al., 2020 (SimCLR); Khosla et al., 2020; Chen et al., 2020 (MoCo v2); Chen et al., 2021; Caron et al., 2020."""
    method, epochs, batch, optimizer, peak, warmup, end, decay, smallest, jitter, options = CONTRASTIVE[name]
    config = methods.complete(load(name))
    length = schedules.plan(config, IMAGENET)
    rate = schedules.optimizer_schedules(config, length)
    assert (config.method.name, config.global_batch, config.optimizer.name) == (method, batch, optimizer)
    assert length.steps == pytest.approx(epochs * IMAGENET / batch, abs=1)
    assert rate["lr"](max(0, round(warmup * IMAGENET / batch) - 1)) == pytest.approx(peak)
    assert rate["lr"](length.steps) == pytest.approx(end, abs=1e-12)
    assert {rate["wd"](0), rate["wd"](length.steps)} == {decay} and config.optimizer.clip is None
    crops = config.views.global_
    assert (crops.count, crops.size, crops.scale, crops.jitter) == (2, 224, (smallest, 1.0), jitter)
    assert options.items() <= config.method.options.items()


def test_swav_resnet50_crops() -> None:
    """swav_800ep_pretrain.sh: 2 x 224 and 6 x 96; the rate begins at 0.3."""
    config = methods.complete(load("swav_resnet50"))
    local = config.views.local
    assert (local.count, local.size, local.scale, local.blur) == (6, 96, (0.05, 0.14), 0.5)
    assert schedules.optimizer_schedules(config, schedules.plan(config, IMAGENET))["lr"](0) == pytest.approx(0.3)


def test_ijepa_vith14_is_the_published_recipe() -> None:
    """The published code's configs/in1k_vith14_ep300.yaml: 300 epochs of 2048, one plain crop, four targets."""
    config = methods.complete(load("ijepa_vith14"))
    length = schedules.plan(config, IMAGENET)
    rate = schedules.optimizer_schedules(config, length)
    per_epoch, o = IMAGENET / 2048, config.method.options
    assert config.backbone.name == "vit_huge_patch14_224" and length.steps == pytest.approx(300 * per_epoch, abs=1)
    assert rate["lr"](0) == pytest.approx(0.0002) and rate["lr"](round(40 * per_epoch) - 1) == pytest.approx(0.001)
    assert rate["lr"](length.steps) == pytest.approx(1e-6)
    assert (rate["wd"](0), rate["wd"](length.steps)) == pytest.approx((0.04, 0.4)) and config.optimizer.clip is None
    assert (o["targets"], o["predictor_dim"], o["predictor_depth"]) == (4, 384, 12)
    assert [tuple(o[key]) for key in ("target_scale", "target_ratio", "context_scale")] == [
        (0.15, 0.2),
        (0.75, 1.5),
        (0.85, 1.0),
    ]
    assert (o["momentum"], o["momentum_end"], o["loss"]) == (0.996, 1.0, "smooth_l1")
    crops = config.views.global_
    assert (crops.count, crops.size, crops.scale, crops.hflip, crops.jitter) == (1, 224, (0.3, 1.0), 0.0, 0.0)
    assert (crops.grayscale, crops.blur, crops.solarize, config.views.local.count) == (0.0, 0.0, 0.0, 0)


def test_msn_vits16_is_the_published_recipe() -> None:
    """The published code's configs/pretrain/msn_vits16.yaml: 800 epochs of 16 x 64, one masked view, ten of 96 pixels."""
    config = methods.complete(load("msn_vits16"))
    length = schedules.plan(config, IMAGENET)
    rate = schedules.optimizer_schedules(config, length)
    per_epoch, o = IMAGENET / 1024, config.method.options
    assert length.steps == pytest.approx(800 * per_epoch, abs=1)
    assert rate["lr"](0) == pytest.approx(0.0002) and rate["lr"](round(15 * per_epoch) - 1) == pytest.approx(0.001)
    assert (rate["wd"](0), rate["wd"](length.steps)) == pytest.approx((0.04, 0.4))
    assert (o["prototypes"], o["hidden_dim"], o["output_dim"], o["head_batch_norm"]) == (1024, 2048, 256, True)
    assert (o["temperature"], o["sharpening"], o["mean_entropy_weight"], o["entropy_weight"]) == (0.1, 0.25, 1.0, 0.0)
    assert (o["mask_ratio"], o["sinkhorn"], o["momentum"], o["momentum_end"]) == (0.15, 3, 0.996, 1.0)
    first, local = config.views.global_, config.views.local
    assert (first.count, first.size, first.scale) == (2, 224, (0.3, 1.0))
    assert (local.count, local.size, local.scale) == (10, 96, (0.05, 0.3))
    for crops in (first, local):
        assert (crops.brightness, crops.contrast, crops.saturation, crops.hue) == (0.4, 0.4, 0.4, 0.1)
        assert (crops.jitter, crops.grayscale, crops.blur, crops.solarize) == (0.8, 0.2, 0.5, 0.0)


@pytest.mark.parametrize("name", ["vicreg_resnet50", "barlow_twins_resnet50"])
def test_redundancy_recipes_are_published_ones(name: str) -> None:
    """Defaults of the published main.py and main_vicreg.py's command for 1000 epochs: spelled out independently."""
    config = methods.complete(load(name))
    length = schedules.plan(config, IMAGENET)
    rate = schedules.optimizer_schedules(config, length)
    assert (config.backbone.name, config.optimizer.name, config.global_batch) == ("resnet50", "lars", 2048)
    assert length.steps == pytest.approx(1000 * IMAGENET / 2048, abs=1)
    assert rate["lr"](round(10 * IMAGENET / 2048) - 1) == pytest.approx(1.6)
    assert rate["lr"](length.steps) == pytest.approx(0.0016) and rate["wd"](7) == 1e-6
    crops, options = config.views.global_, config.method.options
    assert (crops.count, crops.size, crops.scale, crops.blur, crops.solarize) == (
        *(2, 224, (0.08, 1.0), (1.0, 0.1), (0.0, 0.2)),
    )
    assert (options["hidden_dim"], options["out_dim"]) == (8192, 8192)
    if name == "vicreg_resnet50":
        assert (options["invariance"], options["variance"], options["covariance"]) == (25, 25, 1)
    else:
        assert options["redundancy"] == 0.0051 and options["bias_lr"] * 0.2 == pytest.approx(0.0048)


def test_simsiam_resnet50_is_the_published_recipe() -> None:
    """Chen & He, 2021, section 3, and the README's command."""
    config = methods.complete(load("simsiam_resnet50"))
    length = schedules.plan(config, IMAGENET)
    rate = schedules.optimizer_schedules(config, length)
    assert (config.optimizer.name, config.optimizer.decay_all, config.global_batch) == ("sgd", True, 512)
    assert length.steps == pytest.approx(100 * IMAGENET / 512, abs=1)
    assert rate["lr"](0) == pytest.approx(0.05 * 2) and rate["lr"](length.steps) == pytest.approx(0, abs=1e-12)
    assert rate["wd"](3) == 1e-4
    crops, options = config.views.global_, config.method.options
    assert (crops.scale, crops.saturation, crops.blur, crops.solarize) == ((0.2, 1.0), 0.4, 0.5, 0.0)
    assert (options["hidden_dim"], options["out_dim"], options["predictor_dim"]) == (2048, 2048, 512)
    assert options["fix_predictor_lr"] is True


def test_lejepa_vitl14_is_the_published_recipe() -> None:
    """Balestriero & LeCun, 2025, section 6.1, and the README's table of views and optimizer."""
    config = methods.complete(load("lejepa_vitl14"))
    length = schedules.plan(config, IMAGENET)
    rate = schedules.optimizer_schedules(config, length)
    assert max(rate["lr"](s) for s in range(0, length.steps, 50)) <= 5e-4 and rate["wd"](3) == 0.05
    assert rate["lr"](length.steps) == pytest.approx(5e-7)
    whole, local = config.views.global_, config.views.local
    assert (whole.count, whole.size, whole.scale) == (2, 224, (0.3, 1.0))
    assert (local.count, local.size, local.scale) == (6, 98, (0.05, 0.3))
    for crops in (whole, local):
        assert (crops.jitter, crops.grayscale, crops.blur, crops.solarize) == (0.8, 0.2, 0.5, 0.2)
    options = config.method.options
    assert (options["regularisation"], options["slices"], options["points"], options["t_max"]) == (0.05, 1024, 17, 5.0)


def test_mae_vitb16_is_the_published_recipe() -> None:
    """He et al., 2022, table 8 and section 4.1; PRETRAIN.md of the published code."""
    config = methods.complete(load("mae_vitb16"))
    length = schedules.plan(config, IMAGENET)
    rate = schedules.optimizer_schedules(config, length)
    assert length.steps == pytest.approx(800 * IMAGENET / 4096, abs=1)
    assert rate["lr"](round(40 * IMAGENET / 4096) - 1) == pytest.approx(1.5e-4 * 16) and rate["lr"](length.steps) == 0
    assert (config.optimizer.betas, config.optimizer.weight_decay, config.optimizer.clip) == ((0.9, 0.95), 0.05, None)
    assert config.optimizer.weight_decay_end is None
    crops, o = config.views.global_, config.method.options
    assert (crops.count, crops.scale, crops.jitter, crops.hflip, config.views.local.count) == (1, (0.2, 1.0), 0, 0.5, 0)
    assert (o["mask_ratio"], o["norm_pix"], o["fixed_positions"]) == (0.75, True, True)
    assert (o["decoder_dim"], o["decoder_depth"], o["decoder_heads"]) == (512, 8, 16)


def test_ibot_vits16_is_the_published_recipe() -> None:
    """The README's command for ViT-S/16, and the defaults of main_ibot.py."""
    config = methods.complete(load("ibot_vits16"))
    length = schedules.plan(config, IMAGENET)
    rate = schedules.optimizer_schedules(config, length)
    assert length.steps == pytest.approx(800 * IMAGENET / 1024, abs=1)
    assert rate["lr"](round(10 * IMAGENET / 1024) - 1) == pytest.approx(0.002)
    assert (rate["wd"](0), rate["wd"](length.steps)) == pytest.approx((0.04, 0.4))
    assert (config.views.local.count, config.views.local.size) == (10, 96)
    assert (config.views.global_.scale, config.views.local.scale) == ((0.25, 1.0), (0.05, 0.25))
    o = config.method.options
    assert (o["out_dim"], o["patch_out_dim"], o["norm_last_layer"]) == (8192, None, False)
    assert (o["teacher_temp"], o["patch_temp"], o["warmup_teacher_temp"]) == (0.07, 0.07, 0.04)
    assert (o["mask_probability"], tuple(o["mask_ratio"]), o["momentum"]) == (0.5, (0.1, 0.5), 0.996)


def test_dinov2_vitl14_is_the_published_recipe() -> None:
    """configs/train/vitl14.yaml over ssl_default_config.yaml; the last phase is the same, 62.5 times as fast, at 518 pixels."""
    config = methods.complete(load("dinov2_vitl14"))
    length = schedules.plan(config, 14_197_122)
    rate = schedules.optimizer_schedules(config, length)
    assert (length.steps, config.global_batch) == (500 * 1250, 3072)
    assert max(rate["lr"](s) for s in range(99_000, 101_000, 100)) == pytest.approx(2e-4 * 3**0.5, rel=1e-3)
    assert (rate["wd"](0), rate["wd"](length.steps)) == pytest.approx((0.04, 0.2))
    o = config.method.options
    assert (o["out_dim"], o["patch_out_dim"], o["bottleneck_dim"], o["patch_bottleneck_dim"]) == (
        131072,
        131072,
        384,
        256,
    )
    assert (o["momentum"], o["koleo_weight"], o["sinkhorn_iterations"]) == (0.994, 0.1, 3)
    assert (config.views.global_.size, config.views.local.size, config.views.local.count) == (224, 98, 8)
    high = methods.complete(load("dinov2_vitl14_highres"))
    assert (high.steps, high.views.global_.size, high.init_from.heads) == (10_000, 518, "load")
    assert high.method.options | {"teacher_temp_warmup": "", "freeze_last_layer": ""} == o | {
        "teacher_temp_warmup": "",
        "freeze_last_layer": "",
    }


def test_dinov2_vitl14_gram_goes_on_from_dinov2() -> None:
    """DINOv3, section 4.2, on dinov2_vitl14: same network, heads, views; anchored from its second step, every 10,000 steps."""
    first, config = methods.complete(load("dinov2_vitl14")), methods.complete(load("dinov2_vitl14_gram"))
    assert (config.backbone, config.views, config.global_batch) == (first.backbone, first.views, first.global_batch)
    own = {"gram_weight", "gram_start", "gram_every", "teacher_temp_warmup", "freeze_last_layer"}
    o = config.method.options
    assert {k: v for k, v in o.items() if k not in own} == {
        k: v for k, v in first.method.options.items() if k not in own
    }
    assert (o["gram_weight"], o["gram_every"], first.method.options["gram_weight"]) == (2, "10000 steps", 0)
    length = schedules.plan(config, 14_197_122)
    rate = schedules.optimizer_schedules(config, length)
    assert [rate["lr"](s) for s in (1000, 50_000, 99_999)] == pytest.approx([2e-5 * 3**0.5] * 3)


def test_simmim_vitb16_is_the_published_recipe() -> None:
    """The published 800-epoch ViT-B configuration, at the paper's batch of 2048."""
    config = methods.complete(load("simmim_vitb16"))
    length = schedules.plan(config, IMAGENET)
    rate = schedules.optimizer_schedules(config, length)
    epoch = IMAGENET / 2048
    found = [rate["lr"](round(e * epoch)) for e in (0, 11, 699, 701)]
    assert found == pytest.approx([2e-6, 4e-4, 4e-4, 4e-5], rel=1e-3)
    o = config.method.options
    assert (o["mask_ratio"], o["mask_patch_size"], o["distance"]) == (0.6, 32, "l1")
    assert (config.views.global_.count, config.views.global_.scale, config.views.local.count) == (1, (0.67, 1.0), 0)


def test_capi_vitl14_is_the_published_recipe() -> None:
    """The published code's default_pretrain_config.yaml: half a million steps of 32 x 512, one crop, 16,384 clusters."""
    config = methods.complete(load("capi_vitl14"))
    length = schedules.plan(config, IMAGENET)
    rate = schedules.optimizer_schedules(config, length)
    assert (length.steps, config.global_batch) == (500_000, 16_384)
    assert rate["lr"](49_999) == pytest.approx(0.001) and rate["lr"](500_000) == pytest.approx(0.0000955, rel=1e-2)
    assert {rate["wd"](0), rate["wd"](length.steps)} == {0.1} and config.optimizer.betas == (0.9, 0.95)
    o = config.method.options
    assert (o["clusters"], o["mask_ratio"], o["predicted"], o["roll"]) == (16384, 0.65, 0.05, True)
    assert (o["predictor_depth"], o["predictor_drop_path"], o["sinkhorn"], o["positionwise"]) == (12, 0.2, 3, True)
    assert (o["student_temp"], o["target_temp"], o["cluster_temp"]) == (0.12, 0.06, 0.12)
    assert (o["momentum"], o["momentum_end"], o["momentum_warmup"]) == (0.999, 1.0, "50000 steps")
    crops = config.views.global_
    assert (crops.count, crops.size, crops.scale, crops.interpolation) == (1, 224, (0.6, 1.0), "bicubic")
    assert (crops.hflip, crops.jitter, crops.grayscale, crops.blur, config.views.local.count) == (0.5, 0.0, 0.0, 0.0, 0)
