"""Entry point for accelerate: one run of the recipe, on one CPU or on many GPUs.

accelerate launch scripts/train.py --config configs/quickstart.yaml
accelerate launch --config_file configs/accelerate/ddp.yaml scripts/train.py --config … training.steps=10
"""

from condft.cli import train_command

if __name__ == "__main__":
    train_command()
