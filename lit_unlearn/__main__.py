"""Runs the command line as ``python -m lit_unlearn``."""

import sys

from lit_unlearn.cli import main

if __name__ == "__main__":
    sys.exit(main())
