"""Backbones: timm models behind one interface, their loading, their export."""

from selfsup.backbones.backbone import Backbone, count
from selfsup.backbones.create import create_backbone
from selfsup.backbones.features import Features
from selfsup.backbones.stochastic import StochasticKeys, key_stochastic_layers, strip_stochastic_layers

__all__ = [
    "Backbone",
    "Features",
    "StochasticKeys",
    "count",
    "create_backbone",
    "key_stochastic_layers",
    "strip_stochastic_layers",
]
