"""`python -m scripts.bench.analyzer`: see `scripts.bench.analyzer.run`."""

from scripts.bench.analyzer.run import main

if __name__ == "__main__":
    main()
