"""kdb-fast: re-embed a table of text at the speed of the machine."""

__version__ = "0.1.0"
