"""Reaching a database: addresses, connections, sessions, which errors pass."""
