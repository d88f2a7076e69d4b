"""TimeSformer's weights as other projects name them."""

from typing import Any

from torch import Tensor

_RENAMED = (
    ("embeddings.cls_token", "cls_token"),
    ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.time_embeddings", "time_embed"),
    ("embeddings.patch_embeddings.projection.", "patch_embed.proj."),
    ("encoder.layer.", "blocks."),
    (".temporal_attention.attention.qkv.", ".temporal_attn.qkv."),
    (".temporal_attention.output.dense.", ".temporal_attn.proj."),
    (".attention.attention.qkv.", ".attn.qkv."),
    (".attention.output.dense.", ".attn.proj."),
    (".temporal_layernorm.", ".temporal_norm1."),
    (".temporal_dense.", ".temporal_fc."),
    (".layernorm_before.", ".norm1."),
    (".layernorm_after.", ".norm2."),
    (".intermediate.dense.", ".mlp.fc1."),
    (".output.dense.", ".mlp.fc2."),
    ("layernorm.", "norm."),
    ("classifier.", "head."),
)
"""What `transformers` calls the parts (its modeling_timesformer.py), and what the published code does; in this order."""


def from_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of `TimesformerModel` or `TimesformerForVideoClassification` under the published code's names.

    Any other is given back as it is.
    """
    if not any(key.endswith("embeddings.patch_embeddings.projection.weight") for key in state):
        return dict(state)
    out = {}
    for key, value in state.items():
        name = key.removeprefix("timesformer.")
        for theirs, ours in _RENAMED:
            name = name.replace(theirs, ours)
        out[name] = value
    return out


def infer_timesformer(state: dict[str, Tensor]) -> tuple[str, dict[str, Any]]:
    """(name, options) of the model that a state dict of the published names is of; heads of 64 channels."""
    width, channels, patch, _ = state["patch_embed.proj.weight"].shape
    options: dict[str, Any] = {"attention": "divided" if "blocks.0.temporal_fc.weight" in state else "joint"}
    side = round((state["pos_embed"].shape[1] - 1) ** 0.5)
    options |= {"frames": state["time_embed"].shape[1], "img_size": side * patch, "patch_size": patch}
    options |= {"embed_dim": width, "num_heads": max(1, width // 64), "in_chans": channels}
    options["depth"] = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
    return "timesformer_base_patch16_224", options
