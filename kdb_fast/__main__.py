"""``python -m kdb_fast`` is ``kdb-fast``."""

from .cli import main

if __name__ == "__main__":
    main()
