"""What a run tells people: metrics, curves, grids, progress."""
