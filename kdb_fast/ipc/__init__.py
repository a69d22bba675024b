"""Between processes: the shared memory, the messages, starting a child."""
