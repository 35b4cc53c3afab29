"""`python -m grace.study` is `grace study`."""

import sys

from grace.cli import main

if __name__ == "__main__":
    sys.exit(main(["study", *sys.argv[1:]]))
