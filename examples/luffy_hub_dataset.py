# /// script
# requires-python = ">=3.11"
# dependencies = ["luffy_trl", "trackio"]
#
# [tool.uv.sources]
# luffy_trl = { git = "https://github.com/luffy-trl/luffy_trl" }
# ///
"""
LUFFY on a dataset of the Hub. Each field of LuffyConfig, and so of TRL's GRPOConfig, is a flag of this script.

    uv run luffy_hub_dataset.py --max_steps 100

    hf jobs uv run --flavor a100-large --timeout 6h --secrets HF_TOKEN luffy_hub_dataset.py \
        --push_to_hub --hub_model_id me/my-model --report_to trackio --trackio_space_id me/my-dashboard
"""

from dataclasses import dataclass, field

from trl import TrlParser

from luffy_trl import LuffyConfig, LuffyTrainer
from luffy_trl.data.contract import to_contract
from luffy_trl.data.loading import choose_split, load_splits
from luffy_trl.reporting.trackers import TrackerPictures
from luffy_trl.rewards import math_reward_optional_thought


@dataclass
class Arguments:
    model: str = field(default="Qwen/Qwen2.5-1.5B-Instruct", metadata={"help": "Hub id or directory"})
    dataset: str = field(
        default="Elliott/Openr1-Math-46k-8192",
        metadata={"help": "Hub id, file or directory, with the columns prompt, completion and solution or in a schema "
                          "that prepare-data knows"},
    )  # fmt: skip
    split: str = field(default="train", metadata={"help": "of the dataset"})


# Of one GPU of 80 GB. A generation is 16 prompts x 8 completions; one of the 8 is the dataset's
DEFAULTS = {
    "output_dir": "outputs/luffy",
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 32,
    "max_completion_length": 4096,  # longer demonstrations are left out, and counted
    "learning_rate": 1e-6,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "log_completions": True,
    "num_completions_to_print": 0,
    "report_to": "none",
}


def main(argv: list[str] | None = None) -> None:
    parser = TrlParser((Arguments, LuffyConfig), description=__doc__, allow_abbrev=False)
    parser.set_defaults(**DEFAULTS)
    args, config = parser.parse_args_and_config(argv)
    where = f"--dataset {args.dataset}"
    try:
        dataset = to_contract(choose_split(load_splits(args.dataset, where), args.split, where, "--split"), where)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    trainer = LuffyTrainer(
        model=args.model,
        reward_funcs=math_reward_optional_thought,  # 1 for the right answer, by Math-Verify
        args=config,
        train_dataset=dataset,
    )
    trainer.add_callback(TrackerPictures(trainer))
    trainer.train()
    trainer.save_model()
    trainer.save_state()  # the logs, for `luffy-trl report`
    if config.push_to_hub:
        trainer.push_to_hub(dataset_name=args.dataset)


if __name__ == "__main__":
    main()
