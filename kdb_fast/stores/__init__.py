"""Where vectors go: PostgreSQL with pgvector, or SQLite."""
