"""KameleonDB's catalogue: which entities it has defined, where their records are, and which of them live.

The only part that knows KameleonDB's own tables; sources, stores, search and status ask here. Nothing here writes.
"""
