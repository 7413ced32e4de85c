"""The run's configuration: typed, nested, and strict.

Presets (advgrpo/presets/*.yaml) and `--config FILE` override the defaults, flags override both. Whatever is wrong with
a value is said in the same words (`explain.py`), wherever it came from.
"""

from .base import Options, Positional, Repeated
from .checks import NEED_REFERENCES, check, eligible_steps, needs_references, noisy_steps
from .explain import explain, leaves, section_names
from .flags import nested, parse_command, parse_options, read_flags
from .help import settings_help
from .reading import build, dump, load, merge, preset_names, read, read_preset, read_yaml
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
    "Options",
    "Positional",
    "Repeated",
    "RewardSection",
    "RolloutSection",
    "UpdateSection",
    "build",
    "check",
    "dump",
    "eligible_steps",
    "explain",
    "leaves",
    "load",
    "merge",
    "needs_references",
    "nested",
    "noisy_steps",
    "parse_command",
    "parse_options",
    "preset_names",
    "read",
    "read_flags",
    "read_preset",
    "read_yaml",
    "section_names",
    "settings_help",
]
