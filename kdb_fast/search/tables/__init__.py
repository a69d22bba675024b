"""Searching a target of any kind: a vector column of the user's own table, or a table of vectors beside it."""
