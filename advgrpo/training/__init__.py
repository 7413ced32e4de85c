"""A run: its parts from the settings, the iteration, the update, how it ends and goes on."""
