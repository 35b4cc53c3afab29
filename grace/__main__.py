"""`python -m grace` is the `grace` command."""

import sys

from grace.cli import main

if __name__ == "__main__":
    sys.exit(main())
