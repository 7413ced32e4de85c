"""Settings, values and presets that had another name, so that an old file or command is told the new one.

A name leaves this table once nobody can have a file that old.
"""

from __future__ import annotations

RENAMED = {
    "monitor.log_prob_drift": "monitor.log_prob_mismatch",
    "rollout.noise_level": "rollout.eta",
    "update.max_log_prob_drift": "update.max_log_prob_mismatch",
    "update.optimizer_windows": "update.minibatches",
}
VALUES = {
    "tiny:emoji": "tiny",
    "tiny:emoji:tuning": "tiny:tuning",
    "tiny:emoji:report": "tiny:report",
    "tiny:emoji:names": "tiny:names",
    "tiny:emoji:ink": "tiny:ink",
    "tiny:emoji:outline": "tiny:outline",
}
PRESETS = {
    "tiny-emoji": "tiny",
    "tiny-emoji-nft": "tiny-nft-adv",
    "tiny-emoji-style-ink": "tiny-style-ink",
    "tiny-emoji-style-outline": "tiny-style-outline",
}
