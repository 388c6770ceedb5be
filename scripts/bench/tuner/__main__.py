"""`python -m scripts.bench.tuner`: see `scripts.bench.tuner.run`."""

from scripts.bench.tuner.run import main

if __name__ == "__main__":
    main()
