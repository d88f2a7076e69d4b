"""Backbones by timm name, for training."""

import inspect
import re
import sys
from collections.abc import Sequence
from typing import Any

import timm
from timm.models import get_pretrained_cfg, is_model, list_models, list_pretrained, model_entrypoint
from torch import nn

from selfsup.backbones import mit
from selfsup.backbones.backbone import Backbone, _pair
from selfsup.backbones.clips import ClipBackbone
from selfsup.backbones.positions import PosInterp, set_pos_interp
from selfsup.backbones.timesformer import TimeSformer
from selfsup.backbones.vit3d import ViT3d
from selfsup.backbones.volumes import VolumeBackbone
from selfsup.backbones.xavier import xavier
from selfsup.config import BackboneConfig, suggest
from selfsup.errors import UserError
from selfsup.wording import one_line

OWNED = {
    "num_classes": "a backbone has no classifier",
    "features_only": "use Backbone.feature_maps",
    "checkpoint_path": "use init_from",
    "pretrained_cfg": "use init_from",
    "pretrained_cfg_overlay": "use init_from",
    "scriptable": "TorchScript is not supported",
    "exportable": "use selfsup export",
}
DEFORMABLE = ("deformable", "deformable_modulated")  # options of ours: see `deformable.py`
_FLEXIBLE: tuple[dict[str, Any], ...] = ({"dynamic_img_size": True}, {"strict_img_size": False}, {})


def create_backbone(
    config: BackboneConfig, *, mean: Sequence[float], std: Sequence[float], input_size: int | None = None
) -> Backbone:
    """The backbone a configuration names, freshly initialised from torch's global generator (or pretrained).

    input_size: pixels of the largest crop; models that are built for a size are built for this one, unless the
    option `img_size` says otherwise. Models that can, are made to take other sizes as well. Raises UserError for
    unknown names and options, with a suggestion.

    Residual branches of timm's ResNets begin at zero (He et al., 2019, "Bag of Tricks", section 3.1: the last norm's gamma),
    unless the option `zero_init_last` is false.
    """
    options = dict(config.options)
    for key, why in OWNED.items():
        if key in options:
            raise UserError(f"backbone.{key}={options[key]!r}: {why}; leave it out")
    if options.get("global_pool", "avg") == "":
        raise UserError("backbone.global_pool='': a backbone needs one embedding an image; use avg, token or max")
    options["in_chans"] = config.in_chans
    model, options = build(config.name, options, input_size=input_size, pretrained=config.pretrained)
    if config.init == "xavier":
        xavier(model)
    return wrap(model, config.name, options, mean=mean, std=std, input_size=input_size, pos_interp=config.pos_interp)


def wrap(
    model: nn.Module,
    name: str,
    options: dict[str, Any],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    input_size: int | tuple[int, int] | None,
    pos_interp: PosInterp,
) -> Backbone:
    """A `Backbone` around a timm model built with `options`. Raises UserError if it cannot honour `pos_interp`."""
    honoured = set_pos_interp(model, pos_interp)
    if pos_interp != "timm" and not honoured and getattr(model, "pos_embed", None) is not None:
        raise UserError(
            f"backbone.pos_interp={pos_interp}: only plain ViTs can choose; {name} ({type(model).__name__}) takes timm"
        )
    size = options.get("img_size") or input_size or model.pretrained_cfg["input_size"][-2:]  # type: ignore[index]
    kind = ClipBackbone if isinstance(model, TimeSformer) else VolumeBackbone if isinstance(model, ViT3d) else Backbone
    return kind(model, name=name, options=options, mean=mean, std=std, input_size=_pair(size), pos_interp=pos_interp)


def build(
    name: str, options: dict[str, Any], *, input_size: int | tuple[int, int] | None = None, pretrained: bool = False
) -> tuple[nn.Module, dict[str, Any]]:
    """(timm model without classifier, the options that rebuild it). UserError as in `create_backbone`."""
    check_name(name, pretrained)
    name, options = mit.resolve(name, {**options, "num_classes": 0})
    moving = {key: options.pop(key) for key in DEFORMABLE if key in options}
    cfg = get_pretrained_cfg(name)
    built_for_size = bool(cfg and cfg.fixed_input_size)
    if built_for_size and input_size is not None:
        options.setdefault("img_size", list(_pair(input_size)) if isinstance(input_size, tuple) else input_size)
    given = {"dynamic_img_size", "strict_img_size"} & options.keys()
    for flexible in _FLEXIBLE if built_for_size and not given else ({},):
        try:
            model = timm.create_model(name, pretrained=pretrained, **options, **flexible)
            break
        except TypeError as error:
            if any(f"'{key}'" in str(error) for key in flexible):
                continue
            raise _refused(name, options, error) from None
        except UserError:
            raise
        except (OSError, ImportError) as error:
            raise _refused(name, options, error, pretrained) from None
        except Exception as error:
            raise _refused(name, options, error, pretrained) from None
    if moving:
        moving = _deform(model, name, moving)
    return model, {**options, **flexible, **moving}


def _deform(model: nn.Module, name: str, given: dict[str, Any]) -> dict[str, Any]:
    """The options of `deformable.py` put into effect; those that rebuild it."""
    if given.get("deformable") is None:
        if "deformable_modulated" in given:
            raise UserError(
                "backbone.deformable_modulated is of deformable convolutions; give backbone.deformable=[3, 4]"
            )
        return {}
    from selfsup.backbones.deformable import deform

    modulated = given.get("deformable_modulated", True)
    stages = deform(model, name, given["deformable"], modulated)
    return {"deformable": stages, "deformable_modulated": modulated}


def check_name(name: str, pretrained: bool = False) -> None:
    """Raise UserError unless timm knows this name, or `mit.py` does."""
    if name in mit.MIT:
        if pretrained:
            raise UserError(
                f"backbone.pretrained=true: timm has no weights for {name}; give a published file with init_from"
            )
        return
    if not is_model(name):
        hint = suggest(name.split(".")[0], [*list_models(), *mit.MIT])
        raise UserError(
            f"backbone.name={name!r}: timm has no such model{hint or '; selfsup backbones PATTERN lists them'}"
        )
    architecture, _, tag = name.partition(".")
    tags = [m.partition(".")[2] for m in list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        raise UserError(f"backbone.name={name!r}: {architecture} has no weights {tag!r}{suggest(tag, tags)}")
    if pretrained and not tags:
        raise UserError(f"backbone.pretrained=true: timm has no weights for {name}; leave it false")


def _refused(name: str, options: dict[str, Any], error: Exception, pretrained: bool = False) -> UserError:
    """What timm or a model's constructor threw, as advice."""
    text = " ".join(str(error).split())
    match = re.search(r"(?:(\w+)\.)?__init__\(\) got an unexpected keyword argument '(\w+)'", text)
    if match:
        owner, key = match.groups()
        return UserError(
            f"backbone.{one_line(key)}: not an option of timm's {name}{suggest(key, _option_names(name, owner))}"
        )
    match = re.search(r"got multiple values for keyword argument '(\w+)'", text)
    if match:
        return UserError(f"backbone.{match.group(1)}: timm fixes it for {name}; leave it out")
    text = one_line(text, 160)
    if pretrained:
        return UserError(
            f"backbone.pretrained=true: the weights of {name} could not be fetched or loaded ({text}); "
            "check the network, or give a file with init_from"
        )
    given = ", ".join(f"{k}={v!r}" for k, v in options.items() if k not in ("num_classes", "in_chans"))
    kind = type(error).__name__
    return UserError(f"backbone.name={name}: timm refuses the options ({one_line(given) or 'none'}): {kind}: {text}")


def _option_names(name: str, owner: str | None) -> list[str]:
    module = sys.modules[model_entrypoint(name).__module__]
    kind = getattr(module, owner or "", None)
    return [p for p in inspect.signature(kind).parameters if p != "self"] if isinstance(kind, type) else []
