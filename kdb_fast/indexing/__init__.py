"""A run: records in, flushes out, every record accounted for."""
