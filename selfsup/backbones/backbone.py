"""`Backbone`: any timm model behind one interface (see `Features`)."""

import contextlib
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from selfsup.backbones import masked, packed, stages
from selfsup.backbones.checkpointing import set_checkpointing
from selfsup.backbones.features import Features
from selfsup.backbones.positions import PosInterp
from selfsup.backbones.stochastic import restart
from selfsup.errors import UserError

Size = int | tuple[int, int]
Draw = Callable[[Any], contextlib.AbstractContextManager[None]]
_ATTENTION_ELEMENTS = 1 << 27  # attention matrices are made for so many images at a time: 512 MB in float32


def _draw_nothing(samples: Any) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


class Backbone(nn.Module):
    """A timm model without classifier, its normalisation, and its features.

    `name`, `options`: what rebuilds it with `timm.create_model`. `mean`, `std`: of images in [0, 1], a value a channel.
    `input_size`: pixels, the size it was built for. `embed_dim`: D of `Features.pooled`. `stride`: pixels a patch.
    `pos_interp`: see `positions.py`. `shortcuts`: those of the configuration that `embed` may take.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        name: str,
        options: dict[str, Any],
        mean: Sequence[float],
        std: Sequence[float],
        input_size: Size,
        pos_interp: PosInterp = "timm",
    ) -> None:
        super().__init__()
        self.model = model
        self.name = name
        self.options = dict(options)
        self.in_chans = int(options.get("in_chans", 3))
        self.mean, self.std = tuple(float(v) for v in mean), tuple(float(v) for v in std)
        if len(self.mean) != self.in_chans or len(self.std) != self.in_chans:
            raise UserError(
                f"data.mean, data.std: {len(self.mean)} and {len(self.std)} values for in_chans={self.in_chans}; "
                "give one a channel"
            )
        self.image_size: tuple[int, int] = _pair(input_size)
        self.pos_interp = pos_interp
        self.embed_dim = int(getattr(model, "head_hidden_size", None) or model.num_features)  # type: ignore[arg-type]
        self.shortcuts: frozenset[str] = frozenset()
        self._fixed: bool | None = None

    # ---------------------------------------------------------------------------------------------------- properties

    sees: ClassVar[Literal["images", "clips", "volumes"]] = "images"

    def input_shape(self, size: Size | None = None) -> tuple[int, ...]:
        """Of one image [C, h, w] of `size`, default `image_size`; of a clip or a volume as the loader moves it or as it is."""
        return (self.in_chans, *_pair(size or self.image_size))

    @property
    def input_size(self) -> int:
        """Pixels of the (longer) side it was built for."""
        return max(self.image_size)

    @property
    def stride(self) -> int:
        """Pixels of the image a patch of `Features.patches` stands for, a side."""
        info = getattr(self.model, "feature_info", None)
        if isinstance(info, (list, tuple)) and info:
            return int(info[-1]["reduction"])
        size = getattr(getattr(self.model, "patch_embed", None), "patch_size", None)
        return _pair(size)[0] if size is not None else 32

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels; for nets without patches their stride."""
        return self.stride

    @property
    def patch_shape(self) -> tuple[int, ...]:
        """Sides of a patch in pixels."""
        return (self.patch_size, self.patch_size)

    @property
    def has_attention(self) -> bool:
        """Whether `attention` works: token models whose attention spans the image."""
        if getattr(self.model, "output_fmt", "NCHW") == "NHWC" or not hasattr(self.model, "num_prefix_tokens"):
            return False
        return any(hasattr(m, "attn_drop") for m in self.model.modules())

    @property
    def fixed_size(self) -> bool:
        """Whether `input_size` is the only size it takes. Tried on first use, with one blank image a size."""
        if self._fixed is None:
            self._fixed = not self._is_dynamic() and all(
                self._refusal(size) is not None for size in self._other_sizes()
            )
        return self._fixed

    def extra_repr(self) -> str:
        return f"{self.name}, in_chans={self.in_chans}, input_size={self.input_size}, embed_dim={self.embed_dim}"

    # ------------------------------------------------------------------------------------------------------ features

    def forward(self, images: Tensor) -> Features:
        """[B, C, H, W], normalised -> Features. Raises UserError for sizes the model does not take."""
        out = self._run("forward_features", images)
        return self._split(out, self.model.forward_head(out), images)  # type: ignore[operator]

    def embed(
        self, images: Sequence[Tensor], samples: Sequence[Tensor] = (), draw: Draw = _draw_nothing
    ) -> list[Tensor]:
        """`forward(...).pooled` [B, D] of batches [B, C, H, W], each of another size; at once if `shortcuts` allow it.

        samples: one number a row of each batch; draw(samples) is the context in which stochastic layers run.
        """
        if "packed" in self.shortcuts and not self._compiled_call_impl and packed.fits(self.model):
            for batch in images:
                self._check(batch)
            with draw(torch.cat(list(samples)) if samples else None):
                return packed.embed(self.model, images, cls="cls" in self.shortcuts)  # type: ignore[arg-type]
        out = []
        for i, batch in enumerate(images):
            with draw(samples[i] if samples else None):
                out.append(self(batch).pooled)
        return out

    def feature_maps(self, images: Tensor, layers: Sequence[int] | int, norm: bool = True) -> list[Tensor]:
        """Maps after the given layers (blocks of a ViT, stages of a pyramid; negative from the end; int: the last n).

        images: [B, C, H, W]. Returns [B, D, h, w] a layer, in the order asked for, prefix tokens removed.
        norm: apply the final norm to each, where the model has one that fits.
        """
        wanted, found = self._intermediates(images, layers, norm, prefix=False)
        maps = dict(found)
        return [maps[i] for i in wanted]

    def forward_stages(self, images: Tensor, layers: Sequence[int]) -> tuple[Features, list[Tensor]]:
        """`forward(images)` and `feature_maps(images, layers, norm=False)`, bit for bit, in one pass."""
        return stages.forward_stages(self, images, layers)

    def forward_masked(self, images: Tensor, hidden: Tensor, mask_token: Tensor) -> Features:
        """`forward` with mask_token [D] for the embeddings of hidden patches, bool [B, T], before positions. ViTs only."""
        return masked.forward_masked(self, images, hidden, mask_token)

    def encode_visible(self, images: Tensor, keep: Tensor) -> Tensor:
        """Tokens [B, prefix + k, D], after the final norm, computed from the patches keep [B, k] alone. ViTs only."""
        return masked.encode_visible(self, images, keep)

    def tokens(self, images: Tensor, n_last: int) -> list[tuple[Tensor | None, Tensor]]:
        """Of each of the last n layers, the last one last: (CLS [B, D] or None, mean of the patches [B, D]).

        All after the final norm where there is one: what DINO's linear probe concatenates (n = 4 for ViT-S).
        """
        _, found = self._intermediates(images, n_last, norm=True, prefix=True)
        out: list[tuple[Tensor | None, Tensor]] = []
        for _, value in found:
            maps, prefix = value if isinstance(value, tuple) else (value, None)
            has_cls = prefix is not None and self._has_cls()
            out.append((prefix[:, 0] if has_cls else None, maps.mean(dim=(2, 3))))
        return out

    def attention(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, heads, h, w]: the last block's softmax row of CLS over the patches.

        Columns of CLS and registers are left out, without renormalising. Without a CLS token: the mean over all
        queries. Raises UserError for models whose last attention does not span the image.
        """
        if not self.has_attention:
            raise UserError(f"{self.name} has no attention over the whole image; attention maps need a ViT")
        tokens = math.prod(-(-s // self.stride) for s in images.shape[-2:]) + 1
        heads = max(int(getattr(m, "num_heads", 1)) for m in self.model.modules() if hasattr(m, "attn_drop"))
        chunk = max(1, _ATTENTION_ELEMENTS // (heads * tokens * tokens))
        return torch.cat([self._attention(part) for part in images.split(chunk)])

    # -------------------------------------------------------------------------------------------------------- sizes

    def token_grid(self, size: Size) -> tuple[int, int]:
        """Rows and columns of the patch tokens of an image of `size` (pixels, or (height, width)). ViTs only."""
        return masked.token_grid(self, *_pair(size))

    def grid_of(self, images: Tensor) -> tuple[int, ...]:
        """`token_grid` of a batch."""
        return self.token_grid((images.shape[-2], images.shape[-1]))

    def voxels(self, images: Tensor) -> Tensor:
        """A batch with all its axes apart: of images, themselves."""
        return images

    def check_size(self, size: Size | tuple[int, int, int]) -> None:
        """Raise UserError if images of `size` (pixels, or (height, width)) cannot be taken; says which can."""
        h, w = _pair(size)
        if min(h, w) < 1:
            raise UserError(f"size {_show((h, w))}: sizes are at least 1 pixel")
        message = self._misfit(h, w)
        if message is not None:
            raise UserError(message)
        if self._is_dynamic():
            return
        refusal = self._refusal((h, w))
        if refusal is None:
            return
        other = [s for s in self._other_sizes() if self._refusal(s) is None]
        if other:
            works = f"sizes that work: {', '.join(_show(s) for s in sorted({*other, self.image_size}))}"
        else:
            works = f"it is bound to {_show(self.image_size)}: make all crops that size, or choose a ViT or a ConvNet"
        raise UserError(f"size {_show((h, w))}: {self.name} does not take it ({refusal}); {works}")

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass to save memory; same numbers. UserError where timm has no support."""
        set_checkpointing(self.model, enable, self.name)

    # ------------------------------------------------------------------------------------------------------ internals

    def _run(self, method: str, images: Tensor, **kwargs: Any) -> Any:
        """A method of the timm model; its assertions about sizes become UserErrors."""
        self._check(images)
        restart(self.model)  # a method is called, not the module: its hooks do not run
        try:
            return getattr(self.model, method)(images, **kwargs)
        except AssertionError as error:
            if torch.compiler.is_compiling():
                raise
            raise UserError(f"size {_show(tuple(images.shape[-2:]))}: {self.name}: {error}") from None

    def _check(self, images: Tensor) -> None:
        if images.ndim != 4 or images.shape[1] != self.in_chans:
            raise UserError(f"images of shape {tuple(images.shape)}: {self.name} takes [B, {self.in_chans}, H, W]")
        message = self._misfit(images.shape[2], images.shape[3])
        if message is not None:
            raise UserError(message)

    def _is_dynamic(self) -> bool:
        """A plain ViT: any multiple of its patch."""
        return bool(getattr(self.model, "dynamic_img_size", False)) and hasattr(self.model, "num_prefix_tokens")

    def _misfit(self, h: int, w: int) -> str | None:
        """The message for a size that is not a multiple of the patch, where that is needed."""
        embed = getattr(self.model, "patch_embed", None)
        if not self._is_dynamic() or getattr(embed, "dynamic_img_pad", False) or hasattr(embed, "backbone"):
            return None
        ph, pw = _pair(getattr(embed, "patch_size", 1))
        if h % ph == 0 and w % pw == 0:
            return None
        low, high = (max(h // ph, 1) * ph, max(w // pw, 1) * pw), (-(-h // ph) * ph, -(-w // pw) * pw)
        works = _show(high) if low == high else f"{_show(low)} or {_show(high)}"
        return f"size {_show((h, w))} is not a multiple of the patch ({_show((ph, pw))}) of {self.name}; use {works}"

    def _other_sizes(self) -> list[tuple[int, int]]:
        h, w = self.image_size
        step = max(self.stride, 1)
        near = [(h + step, w + step), (h - step, w - step), (-(-h // 2 // step) * step, -(-w // 2 // step) * step)]
        return [s for s in dict.fromkeys(near) if min(s) >= step and s != self.image_size]

    def _refusal(self, size: tuple[int, int]) -> str | None:
        """Why a blank image of this size fails, or None if it does not."""
        like = next(self.model.parameters())
        modes = {m: m.training for m in self.modules()}
        self.eval()
        try:
            kind = "cpu" if like.is_meta else like.device.type  # shapes alone are asked for: any will do
            with torch.no_grad(), torch.autocast(kind, enabled=False):
                self(torch.zeros(1, self.in_chans, *size, device=like.device, dtype=like.dtype))
        except torch.OutOfMemoryError:
            raise
        except (UserError, AssertionError, RuntimeError, ValueError, IndexError) as error:
            return str(error).split("\n")[0].rpartition(f"{self.name}: ")[2].rstrip(".")
        finally:
            for module, mode in modes.items():
                module.training = mode
        return None

    def _has_cls(self) -> bool:
        return getattr(self.model, "cls_token", None) is not None

    def _split(self, out: Any, pooled: Tensor, images: Tensor) -> Features:
        if not isinstance(out, Tensor) or out.ndim not in (3, 4) or pooled.ndim != 2:
            raise UserError(
                f"backbone.name={self.name}: gives neither a map nor a list of tokens; choose another model"
            )
        if out.ndim == 4:  # [B, D, h, w], or [B, h, w, D]
            nhwc = getattr(self.model, "output_fmt", "NCHW") == "NHWC"
            maps = out.permute(0, 3, 1, 2) if nhwc else out  # [B, D, h, w]
            return Features(pooled, None, pooled.new_zeros(maps.shape[0], 0, maps.shape[1]), maps)
        prefix, (h, w) = self._grid(out.shape[1], images.shape[2], images.shape[3])
        registers = int(getattr(self.model, "num_reg_tokens", 0) or 0)
        patches = out[:, prefix:].transpose(1, 2).reshape(out.shape[0], out.shape[2], h, w)  # [B, D, h, w]
        cls = out[:, 0] if prefix and (self._has_cls() or prefix == 1) else None
        return Features(pooled, cls, out[:, prefix - registers : prefix], patches)

    def _grid(self, tokens: int, height: int, width: int) -> tuple[int, tuple[int, int]]:
        """(number of prefix tokens, (h, w)) of a sequence of so many tokens."""
        declared = getattr(self.model, "num_prefix_tokens", None)
        s = self.stride
        grids = [(-(-height // s), -(-width // s)), (height // s, width // s)]
        for h, w in grids:
            prefix = tokens - h * w
            if h * w > 0 and (prefix == declared if declared else 0 <= prefix <= 1):
                return prefix, (h, w)
        side = math.isqrt(tokens - (declared or 0))
        if side * side == tokens - (declared or 0) and height == width:
            return declared or 0, (side, side)
        raise UserError(f"size {_show((height, width))}: the {tokens} tokens of {self.name} fit no grid of patches")

    def _intermediates(
        self, images: Tensor, layers: Sequence[int] | int, norm: bool, prefix: bool
    ) -> tuple[list[int], list[tuple[int, Any]]]:
        function = getattr(self.model, "forward_intermediates", None)
        if function is None:
            raise UserError(f"{self.name} does not give intermediate layers")
        depth = len(getattr(self.model, "feature_info", None) or [])
        asked = range(-layers, 0) if isinstance(layers, int) else layers
        wanted = [i + depth if i < 0 else i for i in asked]
        if not wanted or any(not 0 <= i < depth for i in wanted):
            raise UserError(f"layers={layers}: {self.name} has layers 0 to {depth - 1}")
        order = sorted(set(wanted))
        known = inspect.signature(function).parameters
        kwargs: dict[str, Any] = {"indices": order, "norm": norm, "output_fmt": "NCHW", "intermediates_only": True}
        if prefix and "return_prefix_tokens" in known:
            kwargs["return_prefix_tokens"] = True
        kwargs = {k: v for k, v in kwargs.items() if k in known}
        try:
            found = self._run("forward_intermediates", images, **kwargs)
        except UserError as error:
            if "norm" not in str(error):
                raise
            found = self._run("forward_intermediates", images, **{**kwargs, "norm": False})  # Hiera: has none that fits
        return wanted, list(zip(order, found, strict=True))

    def _attention(self, images: Tensor) -> Tensor:
        drops: list[tuple[nn.Module, nn.Module, bool]] = []
        for module in self.model.modules():
            if isinstance(getattr(module, "attn_drop", None), nn.Module):
                drops.append((module, module.attn_drop, bool(getattr(module, "fused_attn", False))))  # type: ignore[arg-type]
        module, drop, fused = drops[-1]
        seen: list[Tensor] = []
        handle = drop.register_forward_hook(lambda _m, args, _out: seen.append(args[0]))
        modes = {m: m.training for m in self.modules()}
        self.eval()
        try:
            if fused:
                module.fused_attn = False  # type: ignore[assignment]
            with torch.no_grad():
                out = self._run("forward_features", images)
        finally:
            handle.remove()
            if fused:
                module.fused_attn = True  # type: ignore[assignment]
            for m, mode in modes.items():
                m.training = mode
        prefix, (h, w) = self._grid(out.shape[1], images.shape[2], images.shape[3])
        if not seen or seen[-1].ndim != 4 or seen[-1].shape[-1] != prefix + h * w:
            raise UserError(f"{self.name}: its last attention does not span all patches; attention maps need a ViT")
        weights = seen[-1]  # [B, heads, queries, prefix + h*w]
        rows = weights[:, :, 0] if self._has_cls() else weights.mean(dim=2)  # [B, heads, prefix + h*w]
        return rows[:, :, prefix:].reshape(*rows.shape[:2], h, w)


def count(module: nn.Module) -> tuple[int, int]:
    """(parameters, those that are trained)."""
    sizes = [(p.numel(), p.requires_grad) for p in module.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, trained in sizes if trained)


def _pair(size: Any) -> tuple[int, int]:
    if isinstance(size, (tuple, list)):
        return int(size[0]), int(size[-1])
    return int(size), int(size)


def _show(size: tuple[int, ...]) -> str:
    return f"{size[0]}" if size[0] == size[-1] else f"{size[0]}x{size[-1]}"
