"""`python -m scripts.bench.gpu`: see `scripts.bench.gpu.run`."""

import sys

from scripts.bench.gpu.run import main

if __name__ == "__main__":
    sys.exit(main())
