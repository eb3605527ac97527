# /// script
# requires-python = ">=3.11"
# dependencies = ["luffy_trl[teacher,eval]"]
#
# [tool.uv.sources]
# luffy_trl = { git = "https://github.com/luffy-trl/luffy_trl" }
# ///
"""
From problems and answers alone: a stronger model writes demonstrations, a smaller one learns from them, and is
evaluated on problems that were put aside. Flags that this script does not know are those of `luffy-trl train`.

    uv run teacher_then_luffy.py --problems problems.csv --teacher_url http://localhost:11434/v1 --teacher qwen3:8b

    hf jobs uv run --flavor l40sx1 --timeout 6h --secrets HF_TOKEN --with vllm==0.31.0 teacher_then_luffy.py \
        --problems me/my-problems --backend vllm --push_to_hub True --hub_model_id me/my-model

What the teacher has answered is kept in DIRECTORY/demonstrations: started again, nothing is asked twice.
"""

import argparse

from luffy_trl.commands.cli import main as luffy_trl


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--problems", required=True, help="a .csv, .jsonl or .parquet file, or a Hub id: question and answer")
    add("--model", default="Qwen/Qwen2.5-0.5B-Instruct", help="the one that learns: Hub id or directory")
    add(
        "--teacher",
        default="Qwen/Qwen2.5-7B-Instruct",
        help="the one that writes: a server's name for it, or as --model",
    )
    add("--teacher_url", help="of an OpenAI-compatible server (default: the teacher runs here)")
    add("--backend", choices=("hf", "vllm"), default="hf", help="what runs models here (default: hf, Transformers)")
    add("--reward", default="math_reward_optional_thought", help="says what is right")
    add("--num_samples", default="4", help="answers a problem (default: 4)")
    add("--test_size", default="0.1", help="problems put aside, or their share (default: 0.1)")
    add("--max_tokens", default="1024", help="longest answer, of either model (default: 1024)")
    add("--device", help="of evaluation by Transformers, such as cpu")
    add("--directory", default="outputs/teacher_then_luffy", help="default: outputs/teacher_then_luffy")
    args, of_training = parser.parse_known_args(argv)

    demonstrations, trained = f"{args.directory}/demonstrations", f"{args.directory}/model"
    rewards = ["--reward_funcs", args.reward]
    teacher = ["--teacher_model_name_or_path", args.teacher]
    if args.teacher_url:
        teacher = ["--teacher_url", args.teacher_url, "--teacher_model", args.teacher]
    elif args.backend == "vllm":
        teacher += ["--teacher_backend", "vllm"]
    make = ["--dataset_name", args.problems, *teacher, "--num_samples", args.num_samples, "--max_demonstrations", "1"]
    make += ["--max_tokens", args.max_tokens, "--student", args.model, "--test_size", args.test_size]
    luffy_trl(["make-demonstrations", *make, *rewards, "--output_dir", demonstrations])

    train = ["--model_name_or_path", args.model, "--max_completion_length", args.max_tokens, "--max_steps", "100"]
    train += ["--learning_rate", "1e-5", "--lr_scheduler_type", "constant", "--resume_from_checkpoint", "auto"]
    luffy_trl(["train", "--dataset_name", demonstrations, *train, *rewards, "--output_dir", trained, *of_training])

    common = [
        "--dataset_name",
        demonstrations,
        *rewards,
        "--backend",
        args.backend,
        "--max_new_tokens",
        args.max_tokens,
    ]
    common += ["--device", args.device] if args.device else []
    before, after = f"{args.directory}/before", f"{args.directory}/after"
    luffy_trl(["eval", "--model", args.model, *common, "--name", "before", "--output_dir", before])
    luffy_trl(["eval", "--model", trained, *common, "--name", "after", "--output_dir", after, "--compare", before])


if __name__ == "__main__":
    main()
