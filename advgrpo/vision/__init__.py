"""Frozen image models that rewards and adversaries look through."""
