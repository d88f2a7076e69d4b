"""`masks=X` for `masks.path=X`: short forms of a verb's own keys."""

from typing import Any, ClassVar

from pydantic import model_validator

from selfsup.config import Section, expand_short_forms


class ShortForms(Section):
    """Settings of a verb, with the usual short forms and those of SHORT_FORMS."""

    SHORT_FORMS: ClassVar[dict[str, str]] = {}
    """Key -> the key inside it that is meant where the value is no group of keys."""

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        out = expand_short_forms(values)
        for key, inner in cls.SHORT_FORMS.items():
            if key in out and not isinstance(out[key], (dict, Section)):
                out[key] = {inner: out[key]} if out[key] is not None else {}
        return out
