"""Refused steps: kept by the trainer, computed again by `selfsup replay`."""

from .compute import replay, run
from .refused import keep

__all__ = ["keep", "replay", "run"]
