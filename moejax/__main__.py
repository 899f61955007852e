"""``python -m moejax``."""

import sys

from moejax.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
