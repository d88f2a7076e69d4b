"""Kinds of values and of groups of keys that a schema is made of."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from selfsup.errors import UserError

# `data=X` is short for `data.path=X`, and so on.
SHORT_FORMS = {
    "data": "path",
    "method": "name",
    "optimizer": "name",
    "backbone": "name",
    "mix": "name",
    "init_from": "path",
    "teacher": "path",
}

_DURATION = re.compile(r"^(\d+(?:\.\d+)?)\s*(%|epochs?|steps?|samples?)$")


def _check_duration(value: str) -> str:
    match = _DURATION.match(value)
    if match is None or float(match.group(1)) > 1e15:
        raise ValueError("a duration looks like '10 epochs', '500 steps', '100000 samples' or '10%'")
    return value


def parse_duration(value: str) -> tuple[float, str]:
    """'10 epochs' -> (10.0, 'epoch'); units are '%', 'epoch', 'step', 'sample'."""
    match = _DURATION.match(value)
    if match is None:
        raise UserError(f"not a duration: {value!r}; write '10 epochs', '500 steps', '100000 samples' or '10%'")
    return float(match.group(1)), match.group(2).rstrip("s")


Duration = Annotated[str, AfterValidator(_check_duration)]
Probability = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(gt=0, le=10**15)]
Range = tuple[float, float]


def _rising(value: Any) -> Any:
    """Two numbers low < high, or such a pair a channel."""
    pairs = [value] if value and not isinstance(value[0], tuple) else list(value)
    if not pairs or any(not low < high for low, high in pairs):
        raise ValueError("a value range is two numbers, low < high, or one such pair a channel")
    return value


ValueRange = Annotated[Range | tuple[Range, ...], AfterValidator(_rising)]
Level = Annotated[int, Field(ge=0, le=255)]
Shortcut = Literal["packed", "cls", "prototypes", "heap"]


class Section(BaseModel):
    """A frozen group of keys that refuses keys it does not know."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", populate_by_name=True, validate_default=True, allow_inf_nan=False
    )


class OpenSection(BaseModel):
    """A frozen group whose further keys are checked by their owner (a method, timm)."""

    model_config = ConfigDict(frozen=True, extra="allow")

    @property
    def options(self) -> dict[str, Any]:
        """The keys that are not fields of this section."""
        return dict(self.__pydantic_extra__ or {})


def expand_short_forms(values: Mapping[str, Any]) -> dict[str, Any]:
    """{'data': 'x'} -> {'data': {'path': 'x'}}."""
    out = dict(values)
    for key, inner in SHORT_FORMS.items():
        if key in out and not isinstance(out[key], (dict, BaseModel)):
            out[key] = {inner: out[key]} if out[key] is not None else {}
    return out
