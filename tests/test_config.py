"""The configuration: short forms, overrides, refusals that name the key, and files that load as they were written."""

import itertools
from pathlib import Path

import pytest
import yaml

from selfsup import config as configuration
from selfsup.config import Config, dump, load, parse_duration, parse_overrides, read_recipe
from selfsup.errors import UserError


def refusal(*overrides: str, recipe: str | None = None) -> str:
    """The message of the refusal: at most two lines."""
    with pytest.raises(UserError) as caught:
        load(recipe, overrides)
    text = str(caught.value)
    assert len(text) > 0 and len(text.splitlines()) <= 2
    return text


# ------------------------------------------------------------------------------------------------------- short forms

SHORT = {
    "data=photos": ("data.path", "photos"),
    "method=pkg.mod:Class": ("method.name", "pkg.mod:Class"),
    "optimizer=sgd": ("optimizer.name", "sgd"),
    "backbone=resnet18": ("backbone.name", "resnet18"),
    "init_from=runs/a": ("init_from.path", "runs/a"),
    "teacher=runs/a": ("teacher.path", "runs/a"),
    "mix=ricap": ("mix.name", "ricap"),
}


def get(config: Config, key: str) -> object:
    value: object = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


@pytest.mark.parametrize("override", SHORT)
def test_short_forms(override: str, tmp_path: Path) -> None:
    """On the command line, in a YAML file and written out in full they are the same configuration."""
    key, value = SHORT[override]
    short = load(None, [override])
    assert get(short, key) == value
    assert short == load(None, [f"{key}={value}"])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(override.replace("=", ": ", 1))
    assert load(str(recipe)) == short


def test_every_short_form_is_tested() -> None:
    assert {o.split("=")[0] for o in SHORT} == set(configuration.SHORT_FORMS)


@pytest.mark.parametrize(
    "order", list(itertools.permutations(["data=X", "data.val=Y", "optimizer=sgd", "optimizer.lr=1e-2"]))
)
def test_short_forms_in_any_order(order: tuple[str, ...]) -> None:
    config = load(None, order)
    assert (config.data.path, config.data.val) == ("X", "Y")
    assert (config.optimizer.name, config.optimizer.lr) == ("sgd", 0.01)


def test_short_form_over_a_section_of_the_recipe(tmp_path: Path) -> None:
    """`data=X` replaces the recipe's path and leaves its other keys; a section may replace a short form."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("data: {path: A, max_bad_fraction: 0.5}\nbackbone: resnet18\n")
    config = load(str(recipe), ["data=X", "backbone.in_chans=1"])
    assert (config.data.path, config.data.max_bad_fraction) == ("X", 0.5)
    assert (config.backbone.name, config.backbone.in_chans) == ("resnet18", 1)


@pytest.mark.parametrize("text", ["24:00:00", "1:30", "1:30.5", "007"])
def test_what_yaml_would_count_in_base_60_or_8_is_text(text: str, tmp_path: Path) -> None:
    assert parse_overrides([f"a={text}"]) == {"a": text}
    path = tmp_path / "recipe.yaml"
    path.write_text(f"a: {text}\nb: [0, -3, 0x10, 0.5, 1_000]\n")
    assert read_recipe(str(path)) == {"a": text, "b": [0, -3, 16, 0.5, 1000]}


def test_later_overrides_win() -> None:
    assert load(None, ["seed=1", "data.path=A", "data=B", "seed=2"]).seed == 2
    assert load(None, ["data.path=A", "data=B"]).data.path == "B"
    assert load(None, ["data=B", "data.path=A"]).data.path == "A"


@pytest.mark.parametrize(
    "text, value",
    [("1e-3", 1e-3), ("1E5", 1e5), ("-2e-1", -0.2), ("1.5e-3", 1.5e-3), ("3", 3), ("0.5", 0.5), ("null", None),
     ("true", True), ("a b", "a b"), ("", ""), ("[1, 2]", [1, 2]), ("x=y", "x=y"), ("a: b: c", "a: b: c"),
     ("C:\\x", "C:\\x"), ("{a: 1}", {"a": 1}), ("1e-3x", "1e-3x"), ("2024-01-01", "2024-01-01")],
)  # fmt: skip
def test_values_of_overrides(text: str, value: object) -> None:
    """Numbers with exponents are numbers (YAML 1.1 says text); what is no YAML is text."""
    found = parse_overrides([f"eval.key={text}"])["eval"]["key"]
    assert found == value and type(found) is type(value)


def test_exponents_in_a_file(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("optimizer: {lr: 1e-3, betas: [0.9, 9e-1], warmup: 5%}\n")
    optimizer = load(str(recipe)).optimizer
    assert optimizer.lr == 1e-3 and optimizer.betas == (0.9, 0.9)


@pytest.mark.parametrize("override", ["lr", "=3", "a..b=1", ".a=1", "a.=1", ""])
def test_malformed_override(override: str) -> None:
    assert repr(override) in refusal(override) and "KEY=VALUE" in refusal(override)


def test_value_and_keys_at_once() -> None:
    assert "path" in refusal("data.path=x", "data.path.y=2")


# -------------------------------------------------------------------------------------------------------- unknown keys


@pytest.mark.parametrize(
    "override, suggestion",
    [
        ("stesp=5", "steps"),
        ("optimizer.lrr=1", "optimizer.lr"),
        ("lr=1", "optimizer.lr"),
        ("views.globl.size=8", "views.global"),
        ("views.local.scales=[0.1, 0.2]", "views.local.scale"),
        ("data.valid=x", "data.val"),
        ("checkpoint.evry=5", "checkpoint.every"),
        ("optimiser=sgd", "optimizer"),
        ("init_from.head=load", "init_from.heads"),
    ],
)
def test_unknown_key_has_a_suggestion(override: str, suggestion: str) -> None:
    text = refusal(override)
    assert "unknown key" in text and f"did you mean {suggestion}?" in text


@pytest.mark.parametrize("key", ["zzz", "interval", "float32", "constrained", "function-x", "int", "views.intrp", "on"])
def test_unknown_key_is_named(key: str) -> None:
    """Whatever it is called, names that look like parts of a type included."""
    text = refusal(f"{key}=1")
    assert "unknown key" in text and key in text


def test_unknown_key_of_a_method() -> None:
    from selfsup import methods

    with pytest.raises(UserError, match=r"method\.out_dims.*did you mean method\.out_dim\?"):
        methods.complete(load(None, ["method.out_dims=5"]))
    with pytest.raises(UserError, match=r"method\.out_dim='many'"):
        methods.complete(load(None, ["method.out_dim=many"]))
    with pytest.raises(UserError, match=r"method\.name='dinoo'; did you mean dino\?"):
        methods.complete(load(None, ["method=dinoo"]))
    with pytest.raises(UserError, match=r"method\.name='no_such_package:X'.*cannot be imported"):
        methods.complete(load(None, ["method=no_such_package:X"]))
    with pytest.raises(UserError, match="not a class"):
        methods.complete(load(None, ["method=selfsup.config:load"]))


# -------------------------------------------------------------------------------------------------------- wrong values


@pytest.mark.parametrize(
    "override, key",
    [
        ("steps=abc", "steps"),
        ("steps=0", "steps"),
        ("steps=1.5", "steps"),
        ("global_batch=-4", "global_batch"),
        ("workers=two", "workers"),
        ("seed=-1", "seed"),
        ("precision=fp8", "precision"),
        ("optimizer=adam", "optimizer.name"),
        ("optimizer.lr=fast", "optimizer.lr"),
        ("optimizer.lr=.nan", "optimizer.lr"),
        ("optimizer.betas=[0.9]", "optimizer.betas"),
        ("optimizer.betas=[a, b]", "optimizer.betas"),
        ("optimizer.warmup=ten", "optimizer.warmup"),
        ("optimizer.warmup=10 parsecs", "optimizer.warmup"),
        ("optimizer.warmup=5", "optimizer.warmup"),
        ("views.global.hflip=1.5", "views.global.hflip"),
        ("views.global.interpolation=nearest", "views.global.interpolation"),
        ("views.global.scale=[0.5, 0.1]", "views.global"),
        ("views.global.scale=[0.5, 1.5]", "views.global"),
        ("views.global.blur=[0.1]", "blur"),
        ("views.global.policy=randagment", "did you mean randaugment?"),
        ("views.global.policy_magnitude=31", "views.global.policy_magnitude"),
        ("views.global.policy_fill=256", "views.global.policy_fill"),
        ("views.global.erase=1.5", "views.global.erase"),
        ("views.global.erase=[0.1]", "erase holds 1 probabilities for 2 views"),
        ("views.global.erase_area=[0.5, 0.1]", "erase_area must be two numbers, 0 < low <= high; seen (0.5, 0.1)"),
        ("views.global.erase_area=[0.1, 1.1]", "erase_area is a fraction"),
        ("views.global.erase_area=0.3", "views.global.erase_area"),
        ("views.global.erase_ratio=[0, 1]", "erase_ratio must be two numbers"),
        ("views.global.erase_fill=black", "views.global.erase_fill='black'"),
        ("views.global.cutout=-1", "views.global.cutout"),
        ("views.local.cutout=97", "cutout=97 is larger than the crop of 96 pixels"),
        ("views.global.lighting=-0.1", "views.global.lighting"),
        ("mix=ricp", "mix.name='ricp': Input should be"),
        ("mix=ricp", "did you mean ricap?"),
        ("mix.mixup_alpha=0", "mix.mixup_alpha=0"),
        ("mix={name: ricap, group: 2}", "group=2: ricap mixes 4 images; give 4 or more"),
        ("mix.group=1", "mix.group=1"),
        ("mix.until=soon", "mix.until='soon'"),
        ("mix.probability=2", "mix.probability"),
        ("views.global=5", "views.global"),
        ("views=5", "views"),
        ("views={1: 2}", "views"),
        ("backbone={1: 2}", "backbone"),
        ("checkpoint=often", "checkpoint"),
        ("eval.k=[1, x]", "eval.k"),
        ("data.mean=[0.1, 0.2]", "data.mean"),
        ("data=null", "data.path"),
        ("accumulate=7", "accumulate=7"),
    ],
)
def test_wrong_value_names_key_and_value(override: str, key: str) -> None:
    text = refusal(override)
    assert key in text
    assert "pydantic" not in text and "For further information" not in text


@pytest.mark.parametrize("channels", ["1", "4"])
def test_light_is_for_three_channels(channels: str) -> None:
    text = refusal("views.global.lighting=0.1", f"backbone.in_chans={channels}")
    assert f"views.global.lighting=0.1 is for images of 3 channels; seen backbone.in_chans={channels}" in text


def test_several_faults_are_counted() -> None:
    text = refusal("steps=abc", "workers=two")
    assert "steps" in text and "workers" in text and "1 more" in text


def test_long_values_are_cut() -> None:
    assert len(refusal("steps=" + "x" * 5000)) < 300


# ---------------------------------------------------------------------------------------------------------- durations


def test_two_durations() -> None:
    assert "steps and epochs" in refusal("steps=1", "epochs=2")
    assert "epochs and samples" in refusal("samples=1", "epochs=2")


def test_a_duration_replaces_that_of_the_recipe() -> None:
    assert load("demo").epochs is not None
    config = load("demo", ["steps=7"])
    assert (config.steps, config.epochs, config.samples) == (7, None, None)


def test_two_durations_in_a_file(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("steps: 5\nepochs: 2\n")
    assert "steps and epochs" in refusal(recipe=str(recipe))


def test_parse_duration() -> None:
    assert parse_duration("10 epochs") == (10, "epoch")
    assert parse_duration("1 epoch") == (1, "epoch")
    assert parse_duration("500 steps") == (500, "step")
    assert parse_duration("1000samples") == (1000, "sample")
    assert parse_duration("2.5%") == (2.5, "%")
    for bad in ("", "10", "epochs", "-1 steps", "1e3 steps", "10 step s"):
        with pytest.raises(UserError, match="duration"):
            parse_duration(bad)


# -------------------------------------------------------------------------------------------- sections and defaults


def test_views_keep_their_own_defaults() -> None:
    """Setting one key of a kind of crops leaves its others: local crops stay small, the first global one blurred."""
    base, config = load(None), load(None, ["views.local.count=4", "views.global.size=96"])
    assert config.views.local == base.views.local.model_copy(update={"count": 4})
    assert config.views.local.size == 96 and config.views.local.scale == (0.05, 0.4)
    assert config.views.global_ == base.views.global_.model_copy(update={"size": 96})
    assert config.views.global_.blur == (1.0, 0.1) and config.views.global_.solarize == (0.0, 0.2)


def test_views_keep_their_own_defaults_in_a_file(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("views:\n  local: {count: 2}\n")
    views = load(str(recipe)).views
    assert (views.local.count, views.local.size) == (2, 96)
    assert views.global_.blur == (1.0, 0.1)


def test_another_backbone_drops_the_options_of_the_former() -> None:
    """`selfsup train demo backbone.name=resnet18`: a ConvNet has no patch size; channels are about the data and stay."""
    demo = load("demo")
    assert demo.backbone.options
    for override in ("backbone.name=resnet18", "backbone=resnet18"):
        config = load("demo", [override, "backbone.stem_width=32"])
        assert config.backbone.options == {"stem_width": 32}
        assert config.backbone.in_chans == demo.backbone.in_chans
    same = load("demo", [f"backbone={demo.backbone.name}", "backbone.depth=3"])
    assert same.backbone.options == {**demo.backbone.options, "depth": 3}


def test_another_method_drops_the_options_of_the_former() -> None:
    config = load("dino_vits16", ["method=pkg.mod:Class", "method.size=3"])
    assert config.method.options == {"size": 3}
    assert load("dino_vits16", ["method=dino"]) == load("dino_vits16")


def test_frozen() -> None:
    from pydantic import ValidationError

    config = load(None)
    with pytest.raises(ValidationError):
        config.seed = 1
    with pytest.raises(ValidationError):
        config.optimizer.lr = 1.0


def test_mean_and_std_by_channels() -> None:
    assert load(None).mean == (0.485, 0.456, 0.406)
    assert load(None, ["backbone.in_chans=13"]).std == (0.25,) * 13
    assert load(None, ["backbone.in_chans=1", "data.mean=[0.3]"]).mean == (0.3,)


# ------------------------------------------------------------------------------------------------ writing and reading


@pytest.mark.parametrize("recipe", [None, *configuration.recipe_names()])
def test_dump_loads_as_the_same_configuration(recipe: str | None, tmp_path: Path) -> None:
    config = load(
        recipe, ["optimizer.eps=1e-12", "backbone.some_option=[1, 2]", "data=/tmp/a b/ü#c", "eval.k=[1, 200]"]
    )
    path = tmp_path / "config.yaml"
    path.write_text(dump(config))
    again = load(str(path))
    assert again == config and dump(again) == dump(config)
    assert set(yaml.safe_load(dump(config))) == set(Config.model_fields)  # complete: no key is left to a default


def test_yaml_faults(tmp_path: Path) -> None:
    """Each names the file, in one or two lines."""
    faults = {
        "tab.yaml": b"data:\n\tpath: x\n",
        "open.yaml": b"data: [1, 2\n",
        "list.yaml": b"- a\n- b\n",
        "text.yaml": b"hello\n",
        "numbers.yaml": b"1: 2\n",
        "binary.yaml": bytes(range(128, 256)),
        "python.yaml": b"data: !!python/object/apply:os.system ['echo x']\n",
        "nested.yaml": b"data: {1: 2}\n",
    }
    for name, content in faults.items():
        path = tmp_path / name
        path.write_bytes(content)
        assert str(path) in refusal(recipe=str(path)), name


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    """YAML readers keep the last of two equal keys without a word: the first would be a typo that trains."""
    path = tmp_path / "twice.yaml"
    path.write_text("seed: 1\noptimizer: {lr: 0.1}\nseed: 2\n")
    text = refusal(recipe=str(path))
    assert "seed" in text and str(path) in text


def test_empty_file_is_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("# nothing\n")
    assert load(str(path)) == load(None)


def test_evaluations_as_jobs_have_no_best() -> None:
    """Their figures come when the checkpoint is long written."""
    assert load(None, ["eval.every=5", "eval.as_jobs=true"]).eval.as_jobs and not load(None).eval.as_jobs
    text = refusal("eval.every=5", "eval.as_jobs=true", "checkpoint.keep_best=1")
    assert "checkpoint.keep_best" in text and "eval.as_jobs=false" in text


def test_missing_recipe(tmp_path: Path) -> None:
    assert "demo" in refusal(recipe="demoo")
    assert "did you mean dino_vits16" in refusal(recipe="dino_vit16")
    assert "none.yaml" in refusal(recipe=str(tmp_path / "none.yaml"))
    assert str(tmp_path) in refusal(recipe=str(tmp_path))  # a folder


def test_read_recipe_expands_short_forms(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("data: x\n")
    assert read_recipe(str(path)) == {"data": {"path": "x"}}


def test_copies_beside_a_cache() -> None:
    """Repeated augmentation needs as many draws as there are copies."""
    load(None, ["method=distill", "data.copies=3", "teacher.cache=c", "teacher.cache_epochs=6"])
    with pytest.raises(UserError, match=r"data.copies=3 with teacher.cache_epochs=2: copies would be alike"):
        load(None, ["method=distill", "data.copies=3", "teacher.cache=c", "teacher.cache_epochs=2"])
