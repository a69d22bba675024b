"""Finding, fetching and verifying a model's files."""
