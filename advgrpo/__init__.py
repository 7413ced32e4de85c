"""Reinforcement learning of text-to-image flow models with an adversarial reward."""

__version__ = "0.1.0"
