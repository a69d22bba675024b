"""Who gives vectors: a model on this machine, or an API."""
