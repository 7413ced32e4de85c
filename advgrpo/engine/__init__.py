"""Rollout engines: servers that draw images for a run, and what proves that they draw with its weights."""
