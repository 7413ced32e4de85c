"""What a run will need of memory, before it runs."""
