"""The run's configuration: typed, nested, and strict.

Presets (advgrpo/presets/*.yaml) and `--config FILE` override the defaults, flags override both. Whatever is wrong with
a value is said in the same words (`explain.py`), wherever it came from.
"""

from advgrpo.config.base import Options, Positional, Repeated
from advgrpo.config.checks import (
    check,
    check_micro_batches,
    eligible_steps,
    fits_micro_batches,
    most_steps_after_window,
    nearest_prompts,
    no_sequence_groups,
    noisy_steps,
    not_in_sequence,
    not_sharded,
    unevenly_sharded,
)
from advgrpo.config.config import Config, build, dump, load
from advgrpo.config.engine import EngineSection
from advgrpo.config.explain import did_you_mean, explain, leaves, section_names, shown, wanted
from advgrpo.config.flags import options_of, parse_command, parse_options, read_flags
from advgrpo.config.help import settings_help
from advgrpo.config.judge_checks import NEED_REFERENCES, check_learning, direction, needs_references, untrained
from advgrpo.config.objectives import OBJECTIVES, ObjectiveTraits
from advgrpo.config.reading import merge, nested, preset_names, read, read_preset, read_yaml
from advgrpo.config.rewards import CustomReward, PoolSection, RewardEntry, RewardSection, RewardsSection
from advgrpo.config.sections import (
    LORA_TARGETS,
    MOST_PER_PROMPT,
    AdvantageSection,
    AdversarySection,
    AwmSection,
    EvaluationSection,
    ExportFormat,
    FlagName,
    LoraSection,
    ModelSection,
    MonitorSection,
    NftSection,
    NoiseLevelsSection,
    ObserverSettings,
    OutputSection,
    RolloutSection,
    UpdateSection,
)

__all__ = [
    "LORA_TARGETS",
    "MOST_PER_PROMPT",
    "NEED_REFERENCES",
    "OBJECTIVES",
    "AdvantageSection",
    "AdversarySection",
    "AwmSection",
    "Config",
    "CustomReward",
    "EngineSection",
    "EvaluationSection",
    "ExportFormat",
    "FlagName",
    "LoraSection",
    "ModelSection",
    "MonitorSection",
    "NftSection",
    "NoiseLevelsSection",
    "ObjectiveTraits",
    "ObserverSettings",
    "Options",
    "OutputSection",
    "PoolSection",
    "Positional",
    "Repeated",
    "RewardEntry",
    "RewardSection",
    "RewardsSection",
    "RolloutSection",
    "UpdateSection",
    "build",
    "check",
    "check_learning",
    "check_micro_batches",
    "did_you_mean",
    "direction",
    "dump",
    "eligible_steps",
    "explain",
    "fits_micro_batches",
    "leaves",
    "load",
    "merge",
    "most_steps_after_window",
    "nearest_prompts",
    "needs_references",
    "nested",
    "no_sequence_groups",
    "noisy_steps",
    "not_in_sequence",
    "not_sharded",
    "options_of",
    "parse_command",
    "parse_options",
    "preset_names",
    "read",
    "read_flags",
    "read_preset",
    "read_yaml",
    "section_names",
    "settings_help",
    "shown",
    "unevenly_sharded",
    "untrained",
    "wanted",
]
