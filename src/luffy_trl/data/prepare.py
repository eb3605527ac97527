"""What `luffy-trl prepare-data` does: from a dataset as it is published to a filtered one in the data contract.

    load -> screen each row (map, in processes) -> verify, deduplicate, count (here, batch by batch) -> parquet, card

A stream goes the same way, without the processes. No step holds more than one batch of texts.
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import multiprocess
from datasets import Dataset, Features, IterableDataset
from tqdm.auto import tqdm
from transformers import AutoTokenizer

from ..demonstrations.encoding import DemonstrationEncoder, stop_tokens
from ..reporting.tables_and_curves import text_table
from ..rewards.completions import Thought
from .benchmarks import load_benchmarks
from .contract import contract_features
from .finishing import CONTAMINATED, DUPLICATE, GOLD_UNREADABLE, TOO_LONG, UNVERIFIED, Finisher, Tally
from .loading import batches, choose_split, first_rows, load_splits
from .publishing import dataset_card, look_up
from .recognition import check_prompts_at_head, is_conversational, schema_of
from .rows import with_text_answers
from .schemas import NO_DEMONSTRATION, PUBLISHED, Schema, user_text
from .screening import Screener, screened_features
from .splitting import Split, split_problems
from .writing import DROPPED_FILE, ParquetShards, all_or_nothing, kept_rows, write_splits


# Rows. A trace of 8,192 tokens is about 30 kB, and OpenR1 has up to four a row.
SCREENED_AT_ONCE, FINISHED_AT_ONCE = 100, 500
ROWS_PER_PROCESS = 500  # fewer are not worth starting a process for


def prepare(args: argparse.Namespace, argv: Sequence[str]) -> None:
    """Read, filter and write, all of it or nothing; prints what was kept and dropped.

    Args:
        argv: the command line, for the dataset's card.

    Raises:
        ValueError: for data that cannot be used, naming it.
        OSError: for what cannot be read or written.
    """
    dataset, head = _read(args)
    schema = schema_of(args, list(head[0]), head)
    check_prompts_at_head(args, schema, head)
    if isinstance(dataset, Dataset):
        dataset = with_text_answers(dataset, schema.gold_column, args.source, missing_if_bad=True)
    conversational = is_conversational(args, schema, head)
    features = contract_features(conversational, several=schema.several and args.max_demonstrations != 1)
    print(f"{args.source}: {schema.name} -> {', '.join(features)}", flush=True)
    if schema not in PUBLISHED and (left_out := sorted(set(head[0]) - {*schema.columns, *features})):
        print(f"Columns that are left out: {', '.join(left_out)}", flush=True)
    screener = Screener(
        schema,
        conversational,
        args.system_prompt,
        load_benchmarks(args.benchmarks, args.ngram_size) if args.benchmarks else None,
        None if args.no_length else _encoder(args),
    )
    screener.check_head(head, args.source)
    with all_or_nothing(args.output_dir) as result:
        screened = _screen(dataset, screener, list(head[0]), _processes(args, dataset), result.parent)
        kept = result / "data" if args.test_size is None else result.parent / "kept"
        tally = _finish(args, screened, schema, conversational, features, result / DROPPED_FILE, kept)
        table, split = tally.table(_not_checked(args)), None
        if args.test_size is not None and tally.kept["rows"] == 0:
            kept.rename(result / "data")
        elif args.test_size is not None:
            split = _split(args, kept, result / "data", features)
            table += split.table()
        load = args.push_to_hub or args.output_dir.name
        card = dataset_card(args.output_dir.name, load, look_up(args.source), list(features), table, argv)
        card.save(result / "README.md")

    print(f"\n{text_table(['', 'rows', 'demonstrations'], table)}\n")
    for sentence in tally.malformed():
        print(sentence[0].upper() + sentence[1:])
    if tally.kept["rows"] == 0:
        print(f"Nothing was kept: the reasons are above, and those of each row in {DROPPED_FILE}.")
    if split is not None:
        print(split.says())
    print(f"Dataset, card and {DROPPED_FILE}: {args.output_dir}", flush=True)
    if tally.kept["rows"] > 0:
        reward = "math_reward" if _thought(args, schema) == "required" else "math_reward_optional_thought"
        data = f"--dataset_name {args.output_dir} --reward_funcs {reward} ..."
        alone = "" if tally.kept["demonstrations"] else "--num_demonstrations 0 "
        print(f"Train on it with: train.py {alone}{data}", flush=True)
        if split is not None:
            print(f"Evaluate on it with: luffy-trl eval {data}", flush=True)


def _read(args: argparse.Namespace) -> tuple[Dataset | IterableDataset, list[dict[str, Any]]]:
    """The rows, and the first of them, which say what the columns are like."""
    splits = load_splits(args.source, args.source, args.config, args.streaming, only_split=args.split)
    dataset = choose_split(splits, args.split, args.source, "--split")
    if args.max_rows and isinstance(dataset, IterableDataset):
        dataset = dataset.take(args.max_rows)
    elif args.max_rows:
        dataset = dataset.select(range(min(args.max_rows, len(dataset))))
    return dataset, first_rows(dataset, 100, args.source)


def _encoder(args: argparse.Namespace) -> DemonstrationEncoder:
    """Counts tokens as the trainer will: with every token at which the model stops."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    except (OSError, ValueError) as error:
        raise ValueError(f"--tokenizer {args.tokenizer} cannot be loaded: {error}") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"--tokenizer {args.tokenizer} has no EOS token, so a demonstration cannot end.")
    return DemonstrationEncoder(tokenizer, stop_tokens(args.tokenizer, tokenizer), args.max_tokens, "drop", {})


def _processes(args: argparse.Namespace, dataset: Dataset | IterableDataset) -> int:
    if isinstance(dataset, IterableDataset):
        return 1
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return min(args.num_proc or cores, -(-len(dataset) // ROWS_PER_PROCESS) if not args.num_proc else len(dataset))


def _screen(
    dataset: Dataset | IterableDataset, screener: Screener, columns: list[str], processes: int, folder: Path
) -> Dataset | IterableDataset:
    options = {
        "batched": True,
        "batch_size": SCREENED_AT_ONCE,
        "with_indices": True,
        "remove_columns": columns,
        "features": screened_features(screener.conversational),
    }
    if isinstance(dataset, IterableDataset):
        return dataset.map(screener, **options)
    if processes > 1:  # its own threads in each process would be too many
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        return dataset.map(
            _LeavesCtrlC(screener) if processes > 1 else screener,
            num_proc=processes if processes > 1 else None,
            writer_batch_size=SCREENED_AT_ONCE,
            # beside the result, and gone with it: the cache would keep a second copy of every trace
            cache_file_name=str(folder / "screened.arrow"),
            load_from_cache_file=False,
            desc="Screening",
            **options,
        )
    except multiprocess.TimeoutError as error:  # what `datasets` makes of Ctrl-C
        raise KeyboardInterrupt from error


@dataclass
class _LeavesCtrlC:
    """The screener in a worker process: Ctrl-C is for the main process, which ends its workers."""

    screener: Screener

    def __call__(self, batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        return self.screener(batch, indices)


def _thought(args: argparse.Namespace, schema: Schema) -> Thought:
    """Which part of a demonstration is judged."""
    return args.thought or ("required" if schema in PUBLISHED else "optional")


def _finish(
    args: argparse.Namespace,
    screened: Dataset | IterableDataset,
    schema: Schema,
    conversational: bool,
    features: Features,
    dropped_file: Path,
    kept: Path,
) -> Tally:
    """Verify, deduplicate, count and write, batch by batch."""
    verify = None if args.no_verify else "source" if args.trust_source else "answers"
    total = None if isinstance(screened, IterableDataset) else len(screened)
    with (
        open(dropped_file, "w", encoding="utf-8") as dropped,
        ParquetShards(kept, features) as shards,
        tqdm(total=total, unit=" rows", desc="Finishing") as progress,
    ):
        finish = Finisher(
            verify,
            _thought(args, schema),
            not args.no_deduplicate,
            args.max_demonstrations,
            conversational,
            "demonstrations" in features,
            dropped,
            args.keep_without_demonstration,
        )
        for batch in batches(screened, FINISHED_AT_ONCE, args.source):
            shards.write(finish(batch))
            progress.update(len(batch["row"]))
        shards.write(finish.rest())
    return finish.tally


def _split(args: argparse.Namespace, kept: Path, directory: Path, features: Features) -> Split:
    """The rows that were kept, as two splits in the directory."""
    problems = (user_text(row["prompt"]) for rows in kept_rows(kept, ["prompt"]) for row in rows)
    split = split_problems(problems, args.test_size, args.seed, args.ngram_size)
    write_splits(kept, directory, features, split.test)
    return split


def _not_checked(args: argparse.Namespace) -> dict[str, str]:
    off = {
        CONTAMINATED: not args.benchmarks and "no --benchmarks",
        TOO_LONG: args.no_length and "--no_length",
        GOLD_UNREADABLE: (args.no_verify and "--no_verify") or (args.trust_source and "--trust_source"),
        NO_DEMONSTRATION: args.keep_without_demonstration and "--keep_without_demonstration",
        UNVERIFIED: args.no_verify and "--no_verify",
        DUPLICATE: args.no_deduplicate and "--no_deduplicate",
    }
    return {reason: option for reason, option in off.items() if option}
