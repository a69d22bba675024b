"""A private PostgreSQL with pgvector, which kdb-fast starts and stops: :mod:`.server`."""
