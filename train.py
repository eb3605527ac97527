"""Train a model with LUFFY: `accelerate launch train.py --config recipes/letter_walk.yaml`."""

from luffy_trl.commands.cli import train


if __name__ == "__main__":
    train()
