"""Keys of evaluations that take one value or several."""

from typing import Any

from pydantic import BeforeValidator


def _as_tuple(value: Any) -> Any:
    """A single value, 'a,b' or [a, b] as a tuple."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(","))
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


Many = BeforeValidator(_as_tuple)
"""For a tuple: `k=5`, `k=5,10` and `k=[5, 10]` are all given."""
