"""What the tables are: the target of a run, our own tables, and what they are made with."""
