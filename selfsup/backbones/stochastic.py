"""Drop path and dropout whose masks are pure functions of (seed, step, layer, call, sample).

timm's layers draw from the global generator, so that two ranks, or two micro-batches, draw other masks than one
process would, and a resumed run others than the first. Here every layer reads masks that were made for the samples
at hand: `keys = key_stochastic_layers(model, seed)`, then

    with keys.at(step, samples):        # samples: int64 [N], one number a row of the batch, unique in the step
        out = model(images)             # [N, C, H, W]

Masks are made for all layers at once, on the device of `samples`, without a host sync; the layers hold tensors only,
so that `torch.compile` sees neither rates nor keys as constants. Recomputation under activation checkpointing needs
the masks of the forward pass: `capture` (used by `checkpointing.py`).
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from selfsup.errors import UserError
from selfsup.randomness import keyed_uniform, mix

MAX_CALLS = 4  # how often one layer object may be called in one forward of its parent (XCiT's blocks: 3)
_SAMPLE = 0x5851F42D4C957F2D  # odd, spreads sample numbers over 64 bits (Knuth's MMIX multiplier)
_ELEMENT = 0x2545F4914F6CDD1D


def _signed(value: int) -> int:
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


class KeyedLayer(nn.Module):
    """Base of the keyed layers: `draws` [MAX_CALLS, N] holds what the next calls use, None outside `keys.at`."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.draws: Tensor | None = None
        self.rate_tensor: Tensor | None = None
        self.calls = 0

    def _next(self, x: Tensor) -> Tensor:
        """The draws [N] of this call."""
        if self.draws is None:
            raise RuntimeError("a keyed stochastic layer ran in training mode outside `with keys.at(step, samples)`")
        if self.calls >= MAX_CALLS:
            raise RuntimeError(f"a stochastic layer was called more than {MAX_CALLS} times in one forward")
        draws = self.draws[self.calls]
        self.calls += 1
        if x.shape[0] % draws.shape[0]:
            raise RuntimeError(f"keys.at was given {draws.shape[0]} samples for a batch of {x.shape[0]} rows")
        return draws

    def extra_repr(self) -> str:
        return f"rate={self.rate:0.3f}, keyed"


class KeyedDropPath(KeyedLayer):
    """Stochastic depth (Huang et al., 2016): drops whole samples, divides the others by the keep probability."""

    @property
    def drop_prob(self) -> float:
        """timm's name for the rate."""
        return self.rate

    def forward(self, x: Tensor) -> Tensor:
        """[N, ...] -> same; in eval mode the identity."""
        if not self.training:
            return x
        scale = self._next(x)  # [N], 0 or 1 / keep
        if x.shape[0] != scale.shape[0]:  # windows of one image lie side by side: all share its fate
            scale = scale.repeat_interleave(x.shape[0] // scale.shape[0])
        return x * scale.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


class KeyedDropout(KeyedLayer):
    """Dropout (Srivastava et al., 2014), element by element."""

    @property
    def p(self) -> float:
        """torch's name for the rate."""
        return self.rate

    def forward(self, x: Tensor) -> Tensor:
        """[N, ...] or [N * windows, ...] -> same; in eval mode the identity."""
        if not self.training:
            return x
        base = self._next(x)  # int64 [N]
        element = torch.arange(x.numel() // base.shape[0], device=x.device) * _signed(_ELEMENT)
        uniform = keyed_uniform(0, base[:, None] + element).reshape(x.shape)
        assert self.rate_tensor is not None
        rate = self.rate_tensor.to(torch.promote_types(x.dtype, torch.float32))
        return x * ((uniform >= rate) / (1 - rate)).to(x.dtype)


class StochasticKeys:
    """The keyed layers of one module, and the seed they draw with. Copies of the module need their own."""

    def __init__(self, layers: list[KeyedLayer], seed: int) -> None:
        self.layers = layers
        self.seed = seed
        # One random 64-bit number a (layer, call); moved to the device once.
        hashes = [[_signed(mix(0x6C61796572, i, call)) for call in range(MAX_CALLS)] for i in range(len(layers))]
        self._hashes = torch.tensor(hashes, dtype=torch.int64)  # [L, MAX_CALLS]
        self._rates = torch.tensor([layer.rate for layer in layers], dtype=torch.float64)  # [L]

    def __len__(self) -> int:
        return len(self.layers)

    @contextlib.contextmanager
    def at(self, step: int, samples: Tensor) -> Iterator[None]:
        """Forwards inside draw for this step and these samples.

        samples: int64 [N], on the device of the model; row r of the batch (or, where a model folds windows into the
        batch, its rows r*m .. r*m + m - 1) belongs to samples[r]. Give views of one image different numbers.
        """
        if self._hashes.device != samples.device:
            self._hashes, self._rates = self._hashes.to(samples.device), self._rates.to(samples.device)
        key = mix(self.seed, step)
        index = samples.to(torch.int64) * _signed(_SAMPLE) + self._hashes[:, :, None]  # [L, MAX_CALLS, N]
        uniform = keyed_uniform(key, index)
        rates = self._rates[:, None, None]
        scale = (uniform >= rates).to(torch.float64) / (1 - rates)  # [L, MAX_CALLS, N]
        base = index + _signed(mix(key, 1))  # a 64-bit number a (layer, call, sample), from which elements count on
        before = [(layer.draws, layer.rate_tensor) for layer in self.layers]
        for layer, mask, start, rate in zip(self.layers, scale.unbind(), base.unbind(), self._rates.unbind()):
            layer.draws = mask if isinstance(layer, KeyedDropPath) else start
            layer.rate_tensor = rate
            layer.calls = 0
        try:
            yield
        finally:
            for layer, (draws, old_rate) in zip(self.layers, before):
                layer.draws, layer.rate_tensor = draws, old_rate


def restart(module: nn.Module, args: Any = None) -> None:
    """Let the layers right inside `module` count their calls from 0; a forward pre-hook of every parent of such."""
    for child in module.children():
        if isinstance(child, KeyedLayer):
            child.calls = 0


def restart_all(module: nn.Module) -> None:
    """`restart` for the layers anywhere inside."""
    for child in module.modules():
        if isinstance(child, KeyedLayer):
            child.calls = 0


def key_stochastic_layers(module: nn.Module, seed: int) -> StochasticKeys | None:
    """Replace every active DropPath and Dropout inside `module` by keyed ones; None if there are none.

    Layers are numbered in the order of `named_modules`; rates stay as they are. Raises UserError for layers that
    draw random numbers in ways that cannot be keyed (DropBlock, patch dropout, functional dropout).
    """
    _refuse_unkeyed(module)
    layers: list[KeyedLayer] = []
    for parent in list(module.modules()):
        mine = [_replace(parent, name, child) for name, child in list(parent.named_children())]
        new = [layer for layer in mine if layer is not None]
        if new:
            parent.register_forward_pre_hook(restart)
            layers += new
            if getattr(parent, "fused_attn", False) and isinstance(getattr(parent, "attn_drop", None), KeyedDropout):
                parent.__dict__["fused_attn"] = False  # fused attention draws its own dropout
    return StochasticKeys(layers, seed) if layers else None


def _replace(parent: nn.Module, name: str, child: nn.Module) -> KeyedLayer | None:
    keyed: KeyedLayer
    if type(child) is DropPath and child.drop_prob:
        keyed = KeyedDropPath(float(child.drop_prob))
    elif type(child) is nn.Dropout and child.p > 0:
        keyed = KeyedDropout(child.p)
    else:
        return None
    keyed.train(child.training)
    setattr(parent, name, keyed)
    return keyed


def strip_stochastic_layers(module: nn.Module) -> nn.Module:
    """Replace drop path and dropout, keyed or not, by the identity: for a teacher that stays in training mode."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, (KeyedLayer, DropPath, nn.Dropout)):
                setattr(parent, name, _Off())
    return module


class _Off(nn.Identity):
    """An identity that answers the questions timm asks of dropout."""

    p = 0.0
    drop_prob = 0.0


def _refuse_unkeyed(module: nn.Module) -> None:
    for name, child in module.named_modules():
        kind = type(child).__name__
        if "DropBlock" in kind and vars(child).get("drop_prob"):
            raise UserError(f"backbone.drop_block_rate: {name} ({kind}) cannot be made repeatable; leave it out")
        if kind == "PatchDropout" and vars(child).get("prob"):
            raise UserError(f"backbone.patch_drop_rate: {name} drops other patches on every rank; leave it out")
        if isinstance(child, (nn.modules.dropout._DropoutNd)) and type(child) is not nn.Dropout and child.p > 0:
            raise UserError(f"backbone: {name} is a {kind}; only drop path and plain dropout can be keyed; set it to 0")
        if isinstance(child, nn.MultiheadAttention) and child.dropout > 0:
            raise UserError(f"backbone: {name} (MultiheadAttention) has dropout {child.dropout}; only 0 is repeatable")
        rate = getattr(child, "drop_rate", 0.0)
        if isinstance(rate, float) and rate > 0 and "F.dropout(" in inspect.getsource(type(child)):
            raise UserError(
                f"backbone.drop_rate={rate}: {kind} applies it before a classifier that a backbone does not have; "
                "leave it out (drop_path_rate is stochastic depth)"
            )


def capture(module: nn.Module) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Remember what the layers inside `module` draw from now; the result gives a context that puts it back."""
    layers = [m for m in module.modules() if isinstance(m, KeyedLayer)]
    held = [(layer.draws, layer.rate_tensor, layer.calls) for layer in layers]

    @contextlib.contextmanager
    def restored() -> Iterator[None]:
        now = [(layer.draws, layer.rate_tensor, layer.calls) for layer in layers]
        for layer, state in zip(layers, held):
            layer.draws, layer.rate_tensor, layer.calls = state
        try:
            yield
        finally:
            for layer, state in zip(layers, now):
                layer.draws, layer.rate_tensor, layer.calls = state

    return restored
