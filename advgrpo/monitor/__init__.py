"""Red flags from an iteration's metrics, and the witnesses that no reward model is needed for."""
