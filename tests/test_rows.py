"""Every row's prompt and gold answer: read rightly, or refused with row and field before a model is looked for."""

import json
from pathlib import Path

import pytest
from datasets import Dataset, load_dataset

from luffy_trl.commands.cli import main
from luffy_trl.data.loading import load_splits
from luffy_trl.data.rows import checked_rows

from .test_data_files import lines, read, refusal


def messages(text="1 + 1?", role="user", **more):
    return [{"role": role, "content": text, **more}]


def row(prompt, solution="2"):
    return {"prompt": prompt, "completion": messages("\\boxed{2}", "assistant"), "solution": solution}


# What one row of eight has as its prompt, and what is said of it
MALFORMED = {
    "no content": ([{"role": "user", "content": None}], "`prompt[0]` has the content NoneType None, expected a text"),
    "content is missing": ([{"role": "user"}], "`prompt[0]` has the content NoneType None"),
    "no role": ([{"content": "1 + 1?"}], "`prompt[0]` is dict {'content': '1 + 1?'} without a role"),
    "role is empty": ([{"role": "", "content": "1?"}], "without a role"),
    "the second has no role": ([*messages(), {"role": None, "content": "x"}], "`prompt[1]` is dict {'content': 'x'}"),
    "ShareGPT": ([{"from": "human", "value": "1?"}], "Rename `from` to role (human is user, gpt is assistant) and"),
    "texts": (["1 + 1?"], "`prompt[0]` is str '1 + 1?', expected a message with a role and content"),
    "lists": ([["1 + 1?"]], "`prompt[0]` is list ['1 + 1?'], expected a message"),
    "one message": (messages()[0], "`prompt` is dict {'role': 'user', 'content': '1 + 1?'}, expected a text, or a l"),
    "a text among messages": ("1 + 1?", "`prompt` is str '1 + 1?', but the prompts before it are lists of messages"),
    "a number": (7, "`prompt` is int 7, expected a text, or a list of messages"),
    "nothing": (None, "`prompt` is NoneType None, expected a text"),
    "no message": ([], "`prompt` is list []"),
    "None for a message": ([None], "`prompt[0]` is NoneType None, expected a message"),
    "content is an object": ([{"role": "user", "content": {"text": "1?"}}], "`prompt[0]` has the content dict"),
    "parts are texts": (
        [{"role": "user", "content": ["1?"]}],
        "`prompt[0]` has the content[0] str '1?', expected a p",
    ),
    "a part without type": ([{"role": "user", "content": [{"text": "1?"}]}], "`prompt[0]` has the content[0] dict"),
    "a part without text": ([{"role": "user", "content": [{"type": "text"}]}], "has the content[0] dict"),
}


@pytest.mark.parametrize("more", [[], ["--num_demonstrations", "0"], ["--dataset_streaming"]], ids=str)
@pytest.mark.parametrize("kind", MALFORMED)
def test_train_refuses_a_malformed_prompt(tmp_path, kind, more, capsys):
    prompt, said = MALFORMED[kind]
    rows = [row(messages(f"{i} + 2?")) for i in range(8)]
    rows[3]["prompt"] = prompt
    last = refusal("train", lines(tmp_path / "x.jsonl", rows), capsys, *more)
    assert "x.jsonl, row 3: `prompt" in last
    assert said in last


@pytest.mark.parametrize("kind", MALFORMED)
def test_sft_refuses_it_too(tmp_path, kind, capsys):
    prompt, said = MALFORMED[kind]
    path = lines(tmp_path / "x.jsonl", [row(messages()), row(prompt)])
    last = refusal("sft", path, capsys)
    assert "x.jsonl, row 1: `prompt" in last
    assert said in last


@pytest.mark.parametrize("kind", MALFORMED)
def test_prepare_data_names_the_row_and_keeps_the_others(tmp_path, kind, capsys):
    prompt, _ = MALFORMED[kind]
    rows = [row(messages("1 + 1?")), row(prompt), row(messages("4 - 2?"))]
    path, output = lines(tmp_path / "x.jsonl", rows), tmp_path / "out"
    main(["prepare-data", str(path), "--output_dir", str(output), "--no_length", "--no_deduplicate"])
    kept = [r["prompt"] for r in read(output)]
    if kind in ("a text among messages", "a part without type"):  # it can be read
        assert len(kept) == 3
        assert kept[1][0]["content"] in ("1 + 1?", "1?")
        return
    assert kept == [messages("1 + 1?"), messages("4 - 2?")]
    assert json.loads((output / "dropped.jsonl").read_text())["row"] == 1
    assert "Malformed prompt, the first in row 1: `prompt" in capsys.readouterr().out


@pytest.mark.parametrize("streaming", [[], ["--streaming"]])
@pytest.mark.parametrize("prompt", [["1 + 1?"], [{"from": "human", "value": "1 + 1?"}], {"role": "user"}, None])
def test_prepare_data_refuses_a_column_of_no_prompts(tmp_path, prompt, streaming, capsys):
    path = lines(tmp_path / "x.jsonl", [row(prompt)] * 3)
    with pytest.raises(SystemExit) as stop:
        main(["prepare-data", str(path), "--output_dir", str(tmp_path / "out"), "--no_length", *streaming])
    assert stop.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "x.jsonl, row 0: `prompt" in last
    assert "none of its first 3 rows has a prompt that can be used" in last
    assert not (tmp_path / "out").exists()


def test_messages_among_texts(tmp_path, capsys):
    path = lines(tmp_path / "x.jsonl", [row("1?"), row("2?"), row(messages())])
    assert "row 2: `prompt` is list [" in refusal("train", path, capsys)


def test_an_evaluation_split_is_checked_too(tmp_path, capsys):
    lines(tmp_path / "data" / "train.jsonl", [row(messages())] * 8)
    lines(tmp_path / "data" / "test.jsonl", [row(messages()), row([{"role": "user", "content": None}])])
    evaluated = ["--eval_strategy", "steps", "--eval_steps", "1"]
    for command in ("train", "sft"):
        last = refusal(command, tmp_path / "data", capsys, *evaluated)
        assert "split 'test', row 1: `prompt[0]` has the content NoneType None" in last


@pytest.mark.parametrize(
    "prompt",
    [
        "1 + 1?",
        messages(),
        [*messages("Think.", "system"), *messages()],
        [*messages(), {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}, *messages("2", "tool")],
        [{"role": "user", "content": [{"type": "text", "text": "1?"}]}],
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x.png"}}]}],
        [*messages(), *messages("2", "assistant")],  # a template may go on from there
        messages("1?", name="me"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_what_trl_takes_passes_unchanged(tmp_path, prompt, streaming):
    path = lines(tmp_path / "x.jsonl", [{"prompt": prompt}] * 3)
    dataset = load_splits(str(path), "it", streaming=streaming)["train"]
    assert [r["prompt"] for r in checked_rows(dataset, "it")] == [r["prompt"] for r in dataset]


def test_a_stream_is_checked_as_it_is_read(tmp_path):
    rows = [{"prompt": str(i)} for i in range(500)]
    rows[400] = {"prompt": None}
    path = lines(tmp_path / "x.jsonl", rows)
    dataset = checked_rows(load_splits(str(path), "it", streaming=True)["train"], "it")
    with pytest.raises(ValueError, match=r"^it, row 400: `prompt` is NoneType None"):
        list(dataset)


@pytest.mark.parametrize("streaming", [[], ["--dataset_streaming"]])
@pytest.mark.parametrize(
    ("solutions", "said"),
    [
        (["2", [2]], "row 1: `solution` is list [2], but other rows have a number or a text"),
        ([2, True], "row 1: `solution` is bool True, but other rows"),
        (["2", {"value": 2}], "row 1: `solution` is dict {'value': 2}, but other rows"),
        ([2, float("inf")], "row 1: `solution` is inf, expected a number or a text"),
    ],
)
def test_a_gold_answer_that_is_none_is_refused_by_row(tmp_path, solutions, said, streaming, capsys):
    path = lines(tmp_path / "x.jsonl", [row(messages(), solution) for solution in solutions])
    assert said in refusal("train", path, capsys, *streaming)


def test_numbers_and_texts_are_gold_answers_together(tmp_path):
    path = lines(tmp_path / "x.jsonl", [row(messages(f"{i}?"), i if i % 3 else str(i)) for i in range(8)])
    dataset = checked_rows(load_splits(str(path), "it")["train"], "it")
    assert list(dataset["solution"]) == list(map(str, range(8)))
    main(["prepare-data", str(path), "--output_dir", str(tmp_path / "out"), "--no_length", "--no_verify"])
    assert [r["solution"] for r in read(tmp_path / "out")] == list(map(str, range(8)))


def test_without_a_column_of_prompts(tmp_path, capsys):
    path = lines(tmp_path / "x.jsonl", [{"query": "1 + 1?", "completion": "2", "solution": "2"}])
    for command in ("train", "sft"):
        said = refusal(command, path, capsys)
        assert "has no column `prompt`, only query, completion, solution: rename yours, or" in said


def test_sft_names_the_row_of_a_demonstration(tmp_path, capsys):
    path = lines(tmp_path / "x.jsonl", [{"prompt": "1?", "completion": "1"}, {"prompt": "2?", "completion": " "}])
    assert "Row 1: `completion` is empty" in refusal("sft", path, capsys)


def test_the_check_writes_no_second_copy(tmp_path):
    """Of a dataset of gigabytes: the new column is laid beside the old table."""
    path = lines(tmp_path / "x.jsonl", [{"prompt": "a" * 10_000, "solution": i} for i in range(50)])
    dataset = load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    before = sorted(Path(tmp_path / "cache").rglob("*.arrow"))
    checked = checked_rows(dataset, "it")
    assert isinstance(checked, Dataset)
    assert checked.column_names == ["prompt", "solution"]
    assert checked["solution"][:2] == ["0", "1"]
    assert sorted(Path(tmp_path / "cache").rglob("*.arrow")) == before
