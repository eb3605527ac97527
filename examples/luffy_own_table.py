# /// script
# requires-python = ">=3.11"
# dependencies = ["luffy_trl[peft]", "trackio"]
#
# [tool.uv.sources]
# luffy_trl = { git = "https://github.com/luffy-trl/luffy_trl" }
# ///
"""
LUFFY with LoRA on a table of your own: problems, worked solutions and answers. Without --table it trains on products
of two numbers. Each field of LuffyConfig, and so of TRL's GRPOConfig, is a flag of this script.

    uv run luffy_own_table.py --table problems.csv

    hf jobs uv run --flavor l4x1 --timeout 2h --secrets HF_TOKEN luffy_own_table.py --table me/my-problems \
        --push_to_hub --hub_model_id me/my-adapter
"""

from dataclasses import dataclass, field

from datasets import Dataset
from peft import LoraConfig
from trl import TrlParser
from trl.rewards import accuracy_reward

from luffy_trl import LuffyConfig, LuffyTrainer
from luffy_trl.data.loading import load_splits
from luffy_trl.reporting.trackers import TrackerPictures


@dataclass
class Arguments:
    model: str = field(default="Qwen/Qwen2.5-0.5B-Instruct", metadata={"help": "Hub id or directory"})
    table: str | None = field(default=None, metadata={"help": "a .csv, .jsonl or .parquet file, or a Hub id"})
    problem: str = field(default="problem", metadata={"help": "the column of problems"})
    solution: str = field(default="solution", metadata={"help": "the column of worked solutions"})
    answer: str = field(default="answer", metadata={"help": "the column of answers, which rollouts are checked with"})


DEFAULTS = {
    "output_dir": "outputs/luffy_own_table", "per_device_train_batch_size": 8, "gradient_accumulation_steps": 4,
    "max_completion_length": 512, "learning_rate": 2e-5, "lr_scheduler_type": "constant", "max_steps": 100,
    "logging_steps": 1, "log_completions": True, "num_completions_to_print": 0, "report_to": "none",
}  # fmt: skip


def products() -> Dataset:
    pairs = [(a, b) for a in range(12, 60, 3) for b in range(11, 50, 4)]
    parts = [(a, b // 10 * 10, b % 10) for a, b in pairs]
    table = {
        "problem": [f"What is {a} * {b}?" for a, b in pairs],
        "solution": [f"{a} * {tens} = {a * tens} and {a} * {ones} = {a * ones}." for a, tens, ones in parts],
        "answer": [a * b for a, b in pairs],
    }
    return Dataset.from_dict(table)


def main(argv: list[str] | None = None) -> None:
    parser = TrlParser((Arguments, LuffyConfig), description=__doc__, allow_abbrev=False)
    parser.set_defaults(**DEFAULTS)
    args, config = parser.parse_args_and_config(argv)
    try:
        table = load_splits(args.table, f"--table {args.table}")["train"] if args.table else products()
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if missing := {args.problem, args.solution, args.answer} - set(table.column_names):
        names = ", ".join(table.column_names)
        parser.error(
            f"--table {args.table} has no column {min(missing)}: name --problem, --solution, --answer of {names}"
        )

    def to_row(row):
        worked = f"{row[args.solution]}\n\nThe answer is \\boxed{{{row[args.answer]}}}."
        return {
            "prompt": [{"role": "user", "content": str(row[args.problem])}],
            "completion": [{"role": "assistant", "content": worked}],  # the demonstration
            "solution": str(row[args.answer]),  # for the reward
        }

    trainer = LuffyTrainer(
        model=args.model,
        reward_funcs=accuracy_reward,
        args=config,
        train_dataset=table.map(to_row, remove_columns=table.column_names),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.add_callback(TrackerPictures(trainer))
    trainer.train()
    trainer.save_model()
    trainer.save_state()  # the logs, for `luffy-trl report`
    if config.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    main()
