"""What is run and compared; each function is called in a process of its own by :mod:`bench.contender`."""
