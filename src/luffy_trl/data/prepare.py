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
from .rows import with_text_answers
from .schemas import BAD_PROMPT, Schema, UnusableRowError, own_columns, recognise
from .screening import Screener, screened_features
from .writing import DROPPED_FILE, ParquetShards, all_or_nothing


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
    schema = _schema(args, list(head[0]), head)
    _check_head(args, schema, head)
    if isinstance(dataset, Dataset):
        dataset = with_text_answers(dataset, schema.gold_column, args.source, missing_if_bad=True)
    conversational = _is_conversational(args, schema, head)
    features = contract_features(conversational, several=schema.several and args.max_demonstrations != 1)
    print(f"{args.source}: {schema.name} -> {', '.join(features)}", flush=True)
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
        tally = _finish(args, screened, schema, conversational, features, result)
        table = tally.table(_not_checked(args))
        load = args.push_to_hub or args.output_dir.name
        card = dataset_card(args.output_dir.name, load, look_up(args.source), list(features), table, argv)
        card.save(result / "README.md")

    print(f"\n{text_table(['', 'rows', 'demonstrations'], table)}\n")
    for sentence in tally.malformed():
        print(sentence[0].upper() + sentence[1:])
    if tally.kept["rows"] == 0:
        print(f"Nothing was kept: the reasons are above, and those of each row in {DROPPED_FILE}.")
    print(f"Dataset, card and {DROPPED_FILE}: {args.output_dir}", flush=True)
    if tally.kept["rows"] > 0:
        reward = "math_reward" if _thought(args, schema) == "required" else "math_reward_optional_thought"
        print(f"Train on it with: train.py --dataset_name {args.output_dir} --reward_funcs {reward} ...", flush=True)


def _read(args: argparse.Namespace) -> tuple[Dataset | IterableDataset, list[dict[str, Any]]]:
    """The rows, and the first of them, which say what the columns are like."""
    splits = load_splits(args.source, args.source, args.config, args.streaming, only_split=args.split)
    dataset = choose_split(splits, args.split, args.source, "--split")
    if args.max_rows and isinstance(dataset, IterableDataset):
        dataset = dataset.take(args.max_rows)
    elif args.max_rows:
        dataset = dataset.select(range(min(args.max_rows, len(dataset))))
    return dataset, first_rows(dataset, 100, args.source)


def _schema(args: argparse.Namespace, columns: list[str], head: list[dict]) -> Schema:
    schema = None if args.prompt_column else recognise(columns)
    if schema is None:
        prompt, solution = args.prompt_column or "prompt", args.solution_column or "solution"
        contract = "demonstrations" if "demonstrations" in columns else "completion"
        demonstration = args.demonstration_column or contract
        several = any(_is_list_of_several(row.get(demonstration)) for row in head)
        schema = own_columns(prompt, demonstration, solution, several)
    missing = [column for column in schema.columns if column not in columns]
    if missing:
        raise ValueError(
            f"{args.source} has the columns {', '.join(columns)}, but no {' and no '.join(missing)}: name yours with "
            "--prompt-column, --demonstration-column and --solution-column."
        )
    if args.trust_source and not schema.has_verdicts:
        raise ValueError(f"--trust-source: {args.source} has no verdicts of its own on its demonstrations.")
    return schema


def _check_head(args: argparse.Namespace, schema: Schema, head: list[dict]) -> None:
    """Raises ValueError if no prompt at the beginning can be used: then it is the column, not a row."""
    first = None
    for row in head:
        try:
            schema.convert(row)
            return
        except UnusableRowError as error:
            if error.reason != BAD_PROMPT:
                return
            first = first or error
    raise ValueError(
        f"{args.source}, row 0: {first}; none of its first {len(head)} rows has a prompt that can be used. Mend them, "
        "or name the columns with --prompt-column, --demonstration-column and --solution-column."
    )


def _is_list_of_several(value: Any) -> bool:
    """Whether a demonstration column's value is a list of demonstrations, and not the messages of one."""
    return isinstance(value, list) and any(not isinstance(item, dict) for item in value)


def _is_conversational(args: argparse.Namespace, schema: Schema, head: list[dict]) -> bool:
    if schema.conversational is not None or args.conversational:
        return True
    prompts = [row.get(schema.columns[0]) for row in head]
    messages = next((isinstance(prompt, list) for prompt in prompts if isinstance(prompt, list | str)), False)
    if args.system_prompt and not messages:
        raise ValueError("--system-prompt needs messages, and these prompts are texts: add --conversational.")
    return messages


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
    return args.thought or ("optional" if schema.conversational is None else "required")


def _finish(
    args: argparse.Namespace,
    screened: Dataset | IterableDataset,
    schema: Schema,
    conversational: bool,
    features: Features,
    result: Path,
) -> Tally:
    """Verify, deduplicate, count and write, batch by batch."""
    verify = None if args.no_verify else "source" if args.trust_source else "answers"
    total = None if isinstance(screened, IterableDataset) else len(screened)
    with (
        open(result / DROPPED_FILE, "w", encoding="utf-8") as dropped,
        ParquetShards(result / "data", features) as shards,
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
        )
        for batch in batches(screened, FINISHED_AT_ONCE, args.source):
            shards.write(finish(batch))
            progress.update(len(batch["row"]))
    return finish.tally


def _not_checked(args: argparse.Namespace) -> dict[str, str]:
    off = {
        CONTAMINATED: not args.benchmarks and "no --benchmarks",
        TOO_LONG: args.no_length and "--no-length",
        GOLD_UNREADABLE: (args.no_verify and "--no-verify") or (args.trust_source and "--trust-source"),
        UNVERIFIED: args.no_verify and "--no-verify",
        DUPLICATE: args.no_deduplicate and "--no-deduplicate",
    }
    return {reason: option for reason, option in off.items() if option}
