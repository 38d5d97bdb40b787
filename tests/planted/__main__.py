"""`python -m tests.planted`: see `tests/planted/__init__.py`."""

import sys

from tests.planted import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
