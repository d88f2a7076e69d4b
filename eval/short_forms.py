"""`masks=X` for `masks.path=X`: short forms of a verb's own keys."""

from collections.abc import Mapping
from typing import Any

from selfsup.config import Section, expand_short_forms


def expanded(values: Any, forms: Mapping[str, str]) -> Any:
    """With the usual short forms and these (key -> the key inside it) written out; what is no mapping stays as it is."""
    if not isinstance(values, dict):
        return values
    out = expand_short_forms(values)
    for key, inner in forms.items():
        if key in out and not isinstance(out[key], (dict, Section)):
            out[key] = {inner: out[key]} if out[key] is not None else {}
    return out
