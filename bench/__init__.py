"""Benchmarks: each part answers one question. ``python -m bench [PART…] [--quick] [--runs N]``."""
