"""Benchmarks: `python -m bench.kernels`, `python -m bench.gate OLD.json NEW.json`. Never imported by advgrpo."""
