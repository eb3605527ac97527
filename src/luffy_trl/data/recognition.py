"""What `luffy-trl prepare-data` makes of a dataset's columns and first rows: how they are to be read."""

import argparse
from typing import Any

from .problems import recognise_problems
from .schemas import BAD_PROMPT, Schema, UnusableRowError, own_columns, recognise


def schema_of(args: argparse.Namespace, columns: list[str], head: list[dict]) -> Schema:
    """A published schema, or the columns that are named, or those of the data contract or of a table of problems.

    Raises:
        ValueError: if they are not there.
    """
    schema = None if args.prompt_column else recognise(columns)
    if schema is None:
        table = None if args.prompt_column else recognise_problems(columns)
        prompt = table.question if table else args.prompt_column or "prompt"
        solution = table.answer if table else args.solution_column or "solution"
        demonstration = args.demonstration_column or _demonstration_column(args, columns)
        several = any(_is_list_of_several(row.get(demonstration)) for row in head)
        schema = own_columns(prompt, demonstration, solution, several, True if table else None)
    missing = [column for column in schema.columns if column not in columns]
    if missing:
        raise ValueError(
            f"{args.source} has the columns {', '.join(columns)}, but no {' and no '.join(missing)}: name yours with "
            "--prompt_column, --demonstration_column and --solution_column. (--keep_without_demonstration takes "
            "problems that have none.)"
        )
    if args.trust_source and not schema.has_verdicts:
        raise ValueError(f"--trust_source: {args.source} has no verdicts of its own on its demonstrations.")
    return schema


def _demonstration_column(args: argparse.Namespace, columns: list[str]) -> str | None:
    """The data contract's, of those that are there."""
    found = next((column for column in ("demonstrations", "completion") if column in columns), None)
    return found if found or args.keep_without_demonstration else "completion"


def check_prompts_at_head(args: argparse.Namespace, schema: Schema, head: list[dict]) -> None:
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
        "or name the columns with --prompt_column, --demonstration_column and --solution_column."
    )


def _is_list_of_several(value: Any) -> bool:
    """Whether a demonstration column's value is a list of demonstrations, and not the messages of one."""
    return isinstance(value, list) and any(not isinstance(item, dict) for item in value)


def is_conversational(args: argparse.Namespace, schema: Schema, head: list[dict]) -> bool:
    if schema.conversational is not None or args.conversational:
        return True
    prompts = [row.get(schema.columns[0]) for row in head]
    messages = next((isinstance(prompt, list) for prompt in prompts if isinstance(prompt, list | str)), False)
    if args.system_prompt and not messages:
        raise ValueError("--system_prompt needs messages, and these prompts are texts: add --conversational.")
    return messages
