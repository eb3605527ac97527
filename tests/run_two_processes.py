"""Launched by test_distributed.py on one or two processes: train on greedy rollouts and print what was logged."""

import json
import os
import sys

from datasets import Dataset
from transformers import AutoTokenizer

from luffy_trl import LuffyConfig, LuffyTrainer
from luffy_trl.tasks.letter_chain import Links
from luffy_trl.tasks.letter_walk import split_walks, to_dataset


if not __package__:  # of a script that is launched
    from tiny_vlm import build_processor, several_images
else:
    from .tiny_vlm import build_processor, several_images


LONGEST_DEMONSTRATION = 10  # letters; greedy rollouts of the untrained model are longer


def letters_reward(completions: list, **kwargs) -> list[float]:
    """Between 0 and 1, different for most completions: the share of distinct characters."""
    return [len(set(text)) / max(len(text), 1) for text in completions]


def now_and_then(prompts: list, completions: list, **kwargs) -> list[float | None]:
    """`letters_reward`, but for the rollouts of about every other prompt, to which it does not apply."""
    if not isinstance(prompts[0], str):  # messages, the last part of which is a text
        prompts = [messages[0]["content"][-1]["text"] for messages in prompts]
        completions = [messages[0]["content"] for messages in completions]
    rewards = letters_reward(completions)
    return [
        None if sum(map(ord, prompt)) % 2 and len(completion) > LONGEST_DEMONSTRATION else reward
        for prompt, completion, reward in zip(prompts, completions, rewards, strict=True)
    ]


def dataset(guided: list[bool], images: bool = False) -> Dataset:
    if images:
        rows = several_images(len(guided))
    else:
        rows = to_dataset(split_walks(train_size=len(guided), test_size=1, length=4)["train"])
    demonstrations = [[row] if has_one else [] for row, has_one in zip(rows["completion"], guided, strict=True)]
    return rows.remove_columns("completion").add_column("demonstrations", demonstrations)


# demonstrations on the first process only, on both, on the second only, on none
GUIDED = [True] * 2 + [False] * 2 + [True] * 4 + [False] * 2 + [True] * 2 + [False] * 4


def spoken_reward(completions: list, **kwargs) -> list[float]:
    """Of every message, what tools have answered included."""
    return letters_reward([json.dumps(completion) for completion in completions])


def trajectories() -> dict:
    """Of the letter chain. The rollouts of the first process call a tool, the other's do not."""
    from acting_model import chain_rows  # beside this script

    return {"reward_funcs": spoken_reward, "train_dataset": chain_rows(GUIDED), "environment_factory": Links}


def make_trainer(
    model_dir: str,
    output_dir: str,
    rows: int,
    reward=letters_reward,
    acts: bool = False,
    images: bool = False,
    **options,
) -> LuffyTrainer:
    """A trainer on greedy rollouts, for `rows` rows a micro-batch over all processes together.

    Args:
        acts: the rollouts call tools, and demonstrations are trajectories.
        images: the model is of `tiny_vlm`, and so are the prompts.
    """
    args = LuffyConfig(
        output_dir=output_dir,
        num_generations=4,
        per_device_train_batch_size=rows // int(os.environ.get("WORLD_SIZE", "1")),
        max_completion_length=24 if acts else 16,
        max_steps=4,
        learning_rate=1e-3,
        logging_steps=1,
        generation_kwargs={"do_sample": False},  # the same rollouts on any number of processes
        shuffle_dataset=False,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **options,
    )
    data = trajectories() if acts else {"reward_funcs": reward, "train_dataset": dataset(GUIDED, images)}
    processing_class = build_processor() if images else AutoTokenizer.from_pretrained(model_dir)
    return LuffyTrainer(model_dir, args=args, processing_class=processing_class, **data)


def leave(trainer: LuffyTrainer) -> None:
    """End the process once all of them are done."""
    trainer.accelerator.wait_for_everyone()
    sys.stdout.flush()
    # All that is tested is done. On a busy machine gloo's threads, now and then, abort an interpreter that shuts down.
    os._exit(0)


def main(model_dir: str, output_dir: str, options: str) -> None:
    trainer = make_trainer(model_dir, output_dir, reward=now_and_then, **json.loads(options))
    trainer.train()
    trainer.save_model()
    if trainer.is_world_process_zero():
        print("LOG " + json.dumps(trainer.state.log_history[:-1]))
    leave(trainer)


if __name__ == "__main__":
    main(*sys.argv[1:])
