# /// script
# requires-python = ">=3.11"
# dependencies = ["luffy_trl[eval]"]
#
# [tool.uv.sources]
# luffy_trl = { git = "https://github.com/luffy-trl/luffy_trl" }
# ///
"""
Evaluate a model on the paper's benchmarks, and push it with its results in the model card. Flags that this script does
not know are those of `luffy-trl eval`.

    uv run evaluate_and_push.py --model outputs/luffy --tasks luffy_math500 --limit 50

    hf jobs uv run --flavor a100-large --timeout 6h --secrets HF_TOKEN --with vllm==0.31.0 evaluate_and_push.py \
        --model me/my-model --push_to me/my-model --tasks luffy_math --backend vllm
"""

import argparse
from pathlib import Path

from huggingface_hub import snapshot_download

from luffy_trl.commands.eval import main as evaluate
from luffy_trl.commands.push import main as push


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", required=True, help="output directory of a run, or Hub id")
    parser.add_argument("--push_to", metavar="OWNER/NAME", help="push model and results there (default: no push)")
    parser.add_argument("--private", action="store_true", help="if the repository has to be created")
    args, options = parser.parse_known_args(argv)

    directory = Path(args.model)
    if not directory.is_dir():
        directory = Path("outputs") / args.model.replace("/", "--")
        print(f"Downloading {args.model} to {directory} ...", flush=True)
        snapshot_download(args.model, local_dir=directory)
    name = (args.push_to or args.model).rpartition("/")[2]
    results = str(directory / "eval")  # where a push looks for them
    evaluate(["--model", str(directory), "--output_dir", results, "--name", name, *options], "evaluate_and_push.py")
    if args.push_to:
        push(
            [str(directory), "--repo_id", args.push_to, *(["--private"] if args.private else [])],
            "evaluate_and_push.py",
        )


if __name__ == "__main__":
    main()
