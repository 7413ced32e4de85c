"""The run's configuration: typed, nested, and strict.

Presets (advgrpo/presets/*.yaml) and `--config FILE` override the defaults, flags override both.
"""

from .checks import NEED_REFERENCES, check, eligible_steps, needs_references, noisy_steps
from .reading import build, dump, load, merge, preset_names, read_preset, read_yaml
from .sections import (
    LORA_TARGETS,
    AdversarySection,
    Config,
    ExportFormat,
    FlagName,
    LoraSection,
    ModelSection,
    MonitorSection,
    RewardSection,
    RolloutSection,
    UpdateSection,
)

__all__ = [
    "LORA_TARGETS",
    "NEED_REFERENCES",
    "AdversarySection",
    "Config",
    "ExportFormat",
    "FlagName",
    "LoraSection",
    "ModelSection",
    "MonitorSection",
    "RewardSection",
    "RolloutSection",
    "UpdateSection",
    "build",
    "check",
    "dump",
    "eligible_steps",
    "load",
    "merge",
    "needs_references",
    "noisy_steps",
    "preset_names",
    "read_preset",
    "read_yaml",
]
