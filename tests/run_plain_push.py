"""Launched by test_mixins.py: a GRPOTrainer with nothing but the Hub's mixin pushes to a local Hub."""

import sys
from pathlib import Path

from datasets import Dataset
from trl import GRPOTrainer

from luffy_trl.hub.mixin import HubPushConfig, HubPushMixin
from tests.conftest import SMALL_RUN
from tests.run_two_processes import letters_reward


class PlainTrainer(HubPushMixin, GRPOTrainer):
    pass


def main(model_dir: str, output_dir: str) -> None:
    args = HubPushConfig(
        output_dir, max_steps=2, save_strategy="steps", save_steps=1, push_to_hub=True, hub_retry_seconds=0,
        hub_checkpoint_revisions=True, **SMALL_RUN,
    )  # fmt: skip
    trainer = PlainTrainer(model_dir, letters_reward, args, train_dataset=Dataset.from_dict({"prompt": ["Da:"] * 8}))
    trainer.train()
    commit = trainer.push_to_hub()
    print("PUSHED", commit and commit.repo_url, Path(output_dir, "curves.png").is_file())


if __name__ == "__main__":
    main(*sys.argv[1:])
