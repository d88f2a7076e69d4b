"""State dicts of other projects, with the keys timm uses.

Layouts: `selfsup` (a checkpoint of ours: `teacher.backbone.model.*`), `dino` (facebookresearch/dino: dicts `teacher` and
`student`, the latter with `module.`, both with `backbone.` and `head.`), `dinov2` (facebookresearch/dinov2: block
chunks `blocks.0.3.*`, `register_tokens`, `mask_token`, SwiGLU as `w12`/`w3`), `pvt` (NVlabs/SegFormer and whai362/PVT v2),
`segformer` (transformers' SegFormer), `timm` (its own keys, torchvision's ResNets among them).
"""

import re
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from selfsup.backbones import mit
from selfsup.errors import UserError

Branch = Literal["teacher", "student"]
State = dict[str, Tensor]

# Names that wrappers put into keys and that mean nothing.
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
# Where files keep a student's or a plain model's tensors, and an averaged model's.
_NESTED = {
    "teacher": ("teacher", "model_ema", "state_dict_ema", "ema", "student", "model", "state_dict", "model_state"),
    "student": ("student", "model", "state_dict", "model_state"),
}
_BACKBONES = ("backbone.", "encoder_q.", "base_encoder.")
# Not part of a backbone: projection heads, classifiers, masks and decoders of pretraining.
HEADS = re.compile(
    r"^(dino_head|ibot_head|head|heads|head_dist|fc|classifier|last_layer|projection|projector|predictor|decoder\w*"
    r"|mask_token|head\.fc|center|queue\w*|pre_logits)(\.|$)"
)


def select(checkpoint: Any, branch: Branch = "teacher") -> tuple[str, Mapping[str, Any]]:
    """Of nested dicts, the one with the weights: ('teacher', {...}); ('', {...}) for a flat state dict.

    Averaged weights are preferred for the teacher. Raises UserError if `branch` is not there.
    """
    if not isinstance(checkpoint, Mapping):
        raise UserError(f"the file holds a {type(checkpoint).__name__}; a state dict (names to tensors) is needed")
    for key in _NESTED[branch]:
        inner = checkpoint.get(key)
        if isinstance(inner, Mapping) and inner:
            deeper, found = select(inner, branch)
            return (deeper or key, found)
    if not any(isinstance(v, Tensor) for v in checkpoint.values()):
        raise UserError(f"no tensors under {', '.join(_NESTED[branch])}; the file holds {_some(checkpoint)}")
    return "", checkpoint


def convert(checkpoint: Mapping[str, Any], branch: Branch = "teacher") -> tuple[str, State]:
    """(layout name, state dict with timm's keys); tensors of heads are left in, see `HEADS`.

    checkpoint: what `torch.load` or safetensors gave, nested or flat. Raises UserError if there is nothing to use.
    """
    nested, found = select(checkpoint, branch)
    state: State = {}
    for key, value in found.items():
        for wrapper in _WRAPPERS:
            key = key.replace(wrapper, "")
        if isinstance(value, Tensor):
            state[key] = value
    stripped: set[str] = {nested} - {""}
    while True:
        prefix, state = _strip_one(state, branch)
        if not prefix:
            break
        stripped.add(prefix.rstrip("."))
    if not state:
        raise UserError(f"no tensors of a backbone; the file holds {_some(found)}")
    if {"backbone", "model"} <= stripped:
        return "selfsup", state
    if _is_dinov2(state):
        return "dinov2", _from_dinov2(state)
    if found_layout := mit.layout(state):
        return found_layout, mit.to_timm(state, found_layout)
    # Published files with the backbone alone have the same keys as timm's: they count as timm's.
    return ("dino" if stripped & {"teacher", "student", "backbone"} else "timm"), state


def _strip_one(state: State, branch: Branch) -> tuple[str, State]:
    """Take away one prefix, and with it what does not carry it; '' if there is none."""
    if any(key.startswith(("teacher.", "student.")) for key in state):
        present = branch if any(key.startswith(f"{branch}.") for key in state) else None
        if present is None and branch == "student":
            raise UserError(f"no student weights; the file holds {_some(state)}")
        return _keep(state, f"{present or 'student'}.")
    for prefix in _BACKBONES:
        if any(key.startswith(prefix) for key in state):
            return _keep(state, prefix)
    for prefix in ("module.", "model."):
        if state and all(key.startswith(prefix) for key in state):
            return _keep(state, prefix)
    return "", state


def _keep(state: State, prefix: str) -> tuple[str, State]:
    return prefix, {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}


def _is_dinov2(state: State) -> bool:
    if not {"cls_token", "patch_embed.proj.weight"} <= state.keys():
        return False
    return (
        "register_tokens" in state
        or ("mask_token" in state and "blocks.0.ls1.gamma" in state)
        or any(re.match(r"blocks\.\d+\.(\d+\.|mlp\.w12\.)", key) for key in state)
    )


def _from_dinov2(state: State) -> State:
    """Unchunk blocks, name SwiGLU as timm does, and fold CLS's position into the token where there are registers.

    timm's register models add positions to patches alone: cls + pos[0] is the same sum.
    """
    out: State = {}
    for key, value in state.items():
        key = re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", key)  # block numbers count on through the chunks
        key = key.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2.")
        out[key] = value
    if "register_tokens" in out:
        pos = out["pos_embed"]  # [1, 1 + H*W, D]
        out["reg_token"] = out.pop("register_tokens")
        out["cls_token"] = out["cls_token"] + pos[:, :1]
        out["pos_embed"] = pos[:, 1:]
    return {key: value.to(torch.float32) if value.is_floating_point() else value for key, value in out.items()}


def _some(mapping: Mapping[str, Any]) -> str:
    keys = [str(k) for k in list(mapping)[:4]]
    return ", ".join(keys) + (", ..." if len(mapping) > 4 else "") if keys else "nothing"
