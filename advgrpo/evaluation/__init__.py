"""Held-out metrics on fixed noise, and the intervals they are reported with."""
