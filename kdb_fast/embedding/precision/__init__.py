"""Lower precisions: what this machine can do, and whether the vectors are near enough."""
