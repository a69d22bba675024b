"""From shards to vectors and from flushes to rows: processes, or this one."""
