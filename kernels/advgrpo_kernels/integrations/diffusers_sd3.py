"""`diffusers_transformers` under the name that it had when it knew SD3 and SD3.5 alone."""

from .diffusers_transformers import accelerate, restore

__all__ = ["accelerate", "restore"]
