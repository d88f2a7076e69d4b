"""SegFormer's encoders, mit_b0 to mit_b5 (Xie et al., 2021, section 3.1), by names of their own.

They are what timm calls PVT v2 with another width of the Mix-FFN: overlapping patches, k and v from a strided convolution, a
depth-wise convolution in the FFN, no positions. So mit_bN is built as timm's pvt_v2_bN with mlp_ratios of 4, and an exported one
is loaded by bare timm. Here as well: the keys of published files of both families, as timm has them.
"""

import re
from typing import Any

import torch
from torch import Tensor

MIT = {f"mit_b{n}": f"pvt_v2_b{n}" for n in range(6)}
_RATIOS = (4, 4, 4, 4)
# stages' depths -> n; the width of the first stage, 32 or 64, tells 0 from 1
_DEPTHS = {(2, 2, 2, 2): 1, (3, 4, 6, 3): 2, (3, 4, 18, 3): 3, (3, 8, 27, 3): 4, (3, 6, 40, 3): 5}

# names of the authors (NVlabs/SegFormer, whai362/PVT), and those of transformers, as published and as in memory
_AUTHORS = re.compile(r"^block[1-4]\.\d+\.mlp\.dwconv\.dwconv\.weight$")
_TRANSFORMERS = re.compile(
    r"^(segformer\.)?(encoder\.block\.\d+\.\d+|stages\.\d+\.blocks\.\d+)\.mlp\.dwconv\.dwconv\.weight$"
)
_PLACES = [
    (r"^segformer\.", ""),
    (r"^encoder\.patch_embeddings\.(\d+)\.", r"stages.\1.patch_embeddings."),
    (r"^encoder\.block\.(\d+)\.", r"stages.\1.blocks."),
    (r"^encoder\.layer_norm\.(\d+)\.", r"stages.\1.layer_norm."),
]
_PARTS = [
    (r"^stages\.0\.patch_embeddings\.", "patch_embed."),
    (r"\.patch_embeddings\.", ".downsample."),
    (r"^(patch_embed|stages\.\d+\.downsample)\.layer_norm\.", r"\1.norm."),
    (r"^(stages\.\d+)\.layer_norm\.", r"\1.norm."),
    (r"\.(layer_norm_1|layernorm_before)\.", ".norm1."),
    (r"\.(layer_norm_2|layernorm_after)\.", ".norm2."),
    (r"\.attention\.(self\.query|q_proj)\.", ".attn.q."),
    (r"\.attention\.(self\.key|k_proj)\.", ".attn.k."),
    (r"\.attention\.(self\.value|v_proj)\.", ".attn.v."),
    (r"\.attention\.(self\.sr|sequence_reduction\.sequence_reduction)\.", ".attn.sr."),
    (r"\.attention\.(self|sequence_reduction)\.layer_norm\.", ".attn.norm."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.mlp\.dense([12])\.", r".mlp.fc\1."),
]
_OF_AUTHORS = [
    (r"^patch_embed1\.", "patch_embed."),
    (r"^patch_embed([234])\.", lambda m: f"stages.{int(m[1]) - 1}.downsample."),
    (r"^block(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks."),
    (r"^norm(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.norm."),
]


def resolve(name: str, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """(timm's name, its options) of a backbone's name; other names than ours as they are."""
    if name not in MIT:
        return name, options
    return MIT[name], {"mlp_ratios": list(_RATIOS), **options}


def layout(state: dict[str, Tensor]) -> str:
    """'pvt' for the authors' keys of MiT or PVT v2, 'segformer' for those of transformers, '' for others."""
    if any(_AUTHORS.match(key) for key in state):
        return "pvt"
    return "segformer" if any(_TRANSFORMERS.match(key) for key in state) else ""


def to_timm(state: dict[str, Tensor], found: str) -> dict[str, Tensor]:
    """`state` of the layout `found` with timm's keys; what is of a decoder or a classifier is left out."""
    if found == "pvt":
        return {_renamed(key, _OF_AUTHORS): value for key, value in state.items() if not key.startswith("decode_head.")}
    out: dict[str, Tensor] = {}
    for key, value in state.items():
        key = _renamed(key, _PLACES)
        if not key.startswith(("classifier.", "decode_head.")):
            out[_renamed(key, _PARTS)] = value
    for key in [key for key in out if ".attn.k." in key]:
        other = key.replace(".attn.k.", ".attn.v.")
        if other in out:  # timm has one layer for both: k first
            out[key.replace(".attn.k.", ".attn.kv.")] = torch.cat([out.pop(key), out.pop(other)])
    return out


def _renamed(key: str, table: list[Any]) -> str:
    for pattern, new in table:
        key = re.sub(pattern, new, key)
    return key.replace(".dwconv.dwconv.", ".dwconv.")


def is_pvt(state: dict[str, Tensor]) -> bool:
    """Whether timm's keys are of MiT or PVT v2."""
    return {"patch_embed.proj.weight", "stages.0.blocks.0.mlp.dwconv.weight"} <= state.keys()


def infer(state: dict[str, Tensor]) -> tuple[str | None, dict[str, Any]]:
    """(name, options) for a state dict of MiT or PVT v2 with timm's keys; None for one of other sizes."""
    width, channels = state["patch_embed.proj.weight"].shape[:2]
    blocks = [re.match(r"stages\.(\d)\.blocks\.(\d+)\.norm1\.weight$", key) for key in state]
    counts = [0, 0, 0, 0]
    for stage in (int(m[1]) for m in blocks if m):
        counts[min(stage, 3)] += 1
    n = _DEPTHS.get(tuple(counts))  # type: ignore[arg-type]
    if n is None or width not in (32, 64) or (width == 32 and n != 1):
        return None, {}
    n = 0 if width == 32 else n
    narrow = state["stages.0.blocks.0.mlp.fc1.weight"].shape[0] == 4 * width
    linear = "stages.3.blocks.0.attn.sr.weight" in state  # pooled k and v, in all stages
    name = f"mit_b{n}" if narrow else f"pvt_v2_b{n}{'_li' if linear else ''}"
    return name, {"in_chans": channels}
