"""The schema of a configuration: frozen sections that refuse keys they do not know, with every default.

`selfsup.config` reads, merges, explains and writes them, and gives out these names as well.
"""

from selfsup.schema.data import DataConfig, MixConfig
from selfsup.schema.kinds import (
    SHORT_FORMS,
    Duration,
    Level,
    OpenSection,
    Positive,
    Probability,
    Range,
    Section,
    Shortcut,
    ValueRange,
    expand_short_forms,
    parse_duration,
)
from selfsup.schema.training import (
    BackboneConfig,
    CheckpointConfig,
    EarlyStopConfig,
    EvalConfig,
    InitConfig,
    MethodConfig,
    OptimizerConfig,
    SpikeConfig,
    TeacherConfig,
)
from selfsup.schema.views import Crops, ViewsConfig
from selfsup.schema.whole import Config

__all__ = [
    "SHORT_FORMS",
    "BackboneConfig",
    "CheckpointConfig",
    "Config",
    "Crops",
    "DataConfig",
    "Duration",
    "EarlyStopConfig",
    "EvalConfig",
    "InitConfig",
    "Level",
    "MethodConfig",
    "MixConfig",
    "OpenSection",
    "OptimizerConfig",
    "Positive",
    "Probability",
    "Range",
    "Section",
    "Shortcut",
    "SpikeConfig",
    "TeacherConfig",
    "ValueRange",
    "ViewsConfig",
    "expand_short_forms",
    "parse_duration",
]
