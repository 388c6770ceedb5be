"""`python -m condft`, and the command `condft` that pip installs."""

import sys

from condft.cli import main

if __name__ == "__main__":
    sys.exit(main())
