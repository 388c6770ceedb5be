"""`condft train` for accelerate, which launches a file: one run of the recipe, on one CPU or on many GPUs.

accelerate launch scripts/train.py --config configs/quickstart.yaml
accelerate launch --config_file configs/accelerate/ddp.yaml scripts/train.py quickstart.yaml training.steps=10
"""

import sys

from condft.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
