"""Backbones: timm models behind one interface, their loading, their export."""

from selfsup.backbones.backbone import Backbone, count
from selfsup.backbones.create import create_backbone
from selfsup.backbones.export import export_onnx, export_timm, timm_difference
from selfsup.backbones.features import Features
from selfsup.backbones.load import load_backbone, load_into
from selfsup.backbones.pyramid import Pyramid
from selfsup.backbones.stochastic import StochasticKeys, key_stochastic_layers, strip_stochastic_layers

__all__ = [
    "Backbone",
    "Features",
    "Pyramid",
    "StochasticKeys",
    "count",
    "create_backbone",
    "export_onnx",
    "export_timm",
    "key_stochastic_layers",
    "load_backbone",
    "load_into",
    "strip_stochastic_layers",
    "timm_difference",
]
