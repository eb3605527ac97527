"""Data files: read under exactly their names, with every digit, or refused as what they are."""

import bz2
import gzip
import io
import json
import lzma
from decimal import Decimal
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from luffy_trl.commands.cli import main
from luffy_trl.data.benchmarks import load_benchmarks
from luffy_trl.data.loading import check_file, load_splits
from luffy_trl.data.numbers import exact_text
from luffy_trl.data.rows import checked_rows
from luffy_trl.evaluation.documents import read_local


# Each has another meaning to a glob, a URL, a shell or `datasets`
NAMES = [
    "a*", "a?", "[ab]", "a[1]", "{a,b}", "with space", "100%", "%20", "zip::file", "me@main", "hf:x", "a#b", "é漢",
    "~a", "-a", "a\nb", "'\"", "train", "$HOME", "a&b=c", "**", "[!a]", "a:b", "\\d",
]  # fmt: skip


def table(path: Path, columns: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def lines(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path, streaming: bool = False, split: str = "train") -> list[dict]:
    return list(load_splits(str(path), "it", streaming=streaming)[split])


# Names


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_file_is_read_under_exactly_its_name(tmp_path, name, streaming):
    for decoy in ("a1", "ab", "a", "b", "axx", "README", "test"):  # what a pattern might find as well, or instead
        lines(tmp_path / f"{decoy}.jsonl", [{"prompt": "another file"}])
    path = lines(tmp_path / f"{name}.jsonl", [{"prompt": "this"}])
    assert read(path, streaming) == [{"prompt": "this"}]
    assert read(table(tmp_path / f"{name}.parquet", {"prompt": ["that"]}), streaming) == [{"prompt": "that"}]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_directory_too(tmp_path, name, streaming):
    lines(tmp_path / "decoy" / "a.jsonl", [{"prompt": "another"}])
    lines(tmp_path / name / "b[1].jsonl", [{"prompt": "this"}])
    lines(tmp_path / name / "c.jsonl", [{"prompt": "and this"}])
    assert [row["prompt"] for row in read(tmp_path / name, streaming)] == ["this", "and this"]


def test_a_relative_name_and_a_link_are_names_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines(tmp_path / "[x].jsonl", [{"prompt": "this"}])
    assert read(Path("[x].jsonl")) == [{"prompt": "this"}]
    (tmp_path / "[x].jsonl").rename(tmp_path / "blob")  # as the Hub's cache has them
    (tmp_path / "link*.jsonl").symlink_to(tmp_path / "blob")
    assert read(Path("link*.jsonl")) == [{"prompt": "this"}]


def test_a_file_that_was_written_again_is_read_again(tmp_path):
    for text in ("one", "two"):
        assert read(lines(tmp_path / "x.jsonl", [{"prompt": text}])) == [{"prompt": text}]


def test_every_command_reads_such_a_name(tmp_path, tiny_model_dir, capsys):
    name = "[a]*?::b %20.jsonl"
    message = {"role": "user", "content": "What is 1 + 1?"}
    row = {"prompt": [message], "completion": [{"role": "assistant", "content": "\\boxed{2}"}], "solution": 2}
    own = lines(tmp_path / name, [row])
    main(["prepare-data", str(own), "--output_dir", str(tmp_path / "out"), "--no_length"])
    assert read(tmp_path / "out")[0]["solution"] == "2"

    problem = {"data_source": "math", "prompt": [message], "reward_model": {"ground_truth": 2}}
    problems = lines(tmp_path / "eval" / name, [problem])
    documents, _ = read_local([str(problems)])
    assert documents["math"].to_list() == [{"index": 0, "problem": "What is 1 + 1?", "answer": "2", "system": ""}]
    assert load_benchmarks([str(problems)], 13).find("What is 1 + 1?") is not None

    capsys.readouterr()
    broken = lines(tmp_path / "broken" / name, [row, row | {"prompt": []}])
    for command in ("train", "sft"):
        assert "row 1: `prompt` is list []" in refusal(command, broken, capsys)


def refusal(command: str, path: Path, capsys, *more: str) -> str:
    """What train or sft says of this data, before it looks for the model, which is not there."""
    arguments = ["--model_name_or_path", "no/such-model", "--dataset_name", str(path), "--use_cpu", "--bf16", "False"]
    rewards = ["--reward_funcs", "math_reward"] if command == "train" else []
    output = ["--output_dir", str(path.parent / "run-out"), "--report_to", "none"]
    with pytest.raises(SystemExit) as stop:
        main([command, *arguments, *rewards, *output, *more])
    assert stop.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(f"luffy-trl {command}: error: ")
    return last


# Endings


TEXT = b'{"prompt": "a", "solution": 7}\n{"prompt": "b", "solution": "x"}\n'
READ_AS = {
    "x.jsonl": TEXT,
    "x.JSONL": TEXT,
    "x.ndjson": TEXT,
    "x.json": TEXT,
    "list.json": json.dumps([json.loads(line) for line in TEXT.splitlines()], indent=2).encode(),
    "list.jsonl": json.dumps([json.loads(line) for line in TEXT.splitlines()]).encode(),
    "columns.json": json.dumps({"prompt": ["a", "b"], "solution": [7, "x"]}, indent=1).encode(),
    "x.jsonl.gz": gzip.compress(TEXT),
    "x.Json.GZ": gzip.compress(TEXT),
    "x.jsonl.bz2": bz2.compress(TEXT),
    "x.jsonl.xz": lzma.compress(TEXT),
    "bom.jsonl": b"\xef\xbb\xbf" + TEXT,
    "lines.jsonl": TEXT.replace(b"\n", b"\r\n\r\n"),
    "x.csv": b"prompt,solution\na,7\nb,x\n",
    "x.CSV": b'"prompt","solution"\r\n"a","7"\r\n"b","x"\r\n',
    "bom.csv": b"\xef\xbb\xbfprompt,solution\na,7\nb,x\n",
    "x.csv.gz": gzip.compress(b"prompt,solution\na,7\nb,x\n"),
    "x.tsv": b"prompt\tsolution\na\t7\nb\tx\n",
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", READ_AS)
def test_files_of_other_endings_are_read(tmp_path, name, streaming):
    (tmp_path / name).write_bytes(READ_AS[name])
    dataset = checked_rows(load_splits(str(tmp_path / name), "it", streaming=streaming)["train"], "it")
    assert list(dataset) == [{"prompt": "a", "solution": "7"}, {"prompt": "b", "solution": "x"}]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["file", "stream"])
def test_arrow_files_are_read(tmp_path, kind, streaming):
    rows = pa.table({"prompt": ["a"], "solution": [7.0]})
    make = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
    with make(str(tmp_path / "x.arrow"), rows.schema) as writer:
        writer.write_table(rows)
    dataset = checked_rows(load_splits(str(tmp_path / "x.arrow"), "it", streaming=streaming)["train"], "it")
    assert list(dataset) == [{"prompt": "a", "solution": "7"}]


@pytest.mark.parametrize("name", ["x.txt", "x.xlsx", "x.zip", "x.pkl", "x.jsonl.zst", "x.parquet.gz", "x", "x.b.c"])
def test_other_files_are_refused_as_what_they_are(tmp_path, name, capsys):
    (tmp_path / name).write_text("{}")
    ending = Path(name).suffix
    said = f"is a {ending} file, which is not read" if ending else "is a file whose name has no ending"
    for command in ("train", "sft"):
        assert said in refusal(command, tmp_path / name, capsys)
    with pytest.raises(SystemExit) as stop:
        main(["prepare-data", str(tmp_path / name), "--output_dir", str(tmp_path / "out"), "--no_length"])
    assert stop.value.code == 2
    assert "expected a file that ends in .parquet, .json, .jsonl" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("name", ["no.jsonl", "no.TSV", "no.jsonl.gz", "no.xlsx", "no*.parquet"])
def test_a_file_that_is_missing_is_no_hub_id(name):
    with pytest.raises(ValueError, match="it: there is no such file"):
        check_file(name, "it")
    check_file("me/no.1", "it")


# What is wrong with a file


def parquet_bytes(rows: int) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"prompt": ["a" * 100] * rows}), buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("streaming", [[], ["--streaming"]])
@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.parquet", b"", "it holds no rows"),
        ("x.parquet", parquet_bytes(0), "it holds no rows"),
        ("x.parquet", parquet_bytes(100)[:-50], "not a parquet file"),
        ("x.arrow", b"", "it holds no rows"),
        ("x.arrow", b"ARROW1 or so, but not at all", "x.arrow: "),
        ("x.csv", b"", "it holds no rows"),
        ("x.csv", b"prompt,completion,solution\n", "it holds no rows"),
        ("x.csv", b"prompt,completion,solution\na,b,c\nd,e\n", "row 1 of x.csv (up to line 3) has 2 cells, but"),
        ("x.csv", b'prompt,completion,solution\na,b,"c\n', "a quote that nothing closes"),
        ("x.csv", b"prompt,prompt\na,b\n", "two columns named 'prompt'"),
        ("x.csv", "prompt,solution\na,7\ncaf\xe9,7\n".encode("cp1252"), "line 3 of x.csv is not UTF-8 text (byte"),
        ("x.tsv", "prompt\tsolution\n\x93a\x94\t7\n".encode("latin-1"), "iconv -f CP1252 -t UTF-8"),
        ("x.csv", "prompt,solution\na,7\n".encode("utf-16"), "x.csv is UTF-16 text: save it as UTF-8"),
        ("x.jsonl", b"\n\n", "it holds no rows"),
        ("x.json", b"[]", "it holds no rows"),
        ("x.jsonl", TEXT[:-20], "JSON parse error in line 2 of x.jsonl"),
        ("x.json", b"[\n" + TEXT.replace(b"}\n{", b"},\n{")[:-20], "JSON parse error in line 3 of x.json"),
        ("x.jsonl", '{"prompt": "caf\xe9"}'.encode("cp1252"), "line 1 of x.jsonl is not UTF-8 text (byte 0xe9)"),
        ("x.jsonl", TEXT + b"7\n", "line 3 of x.jsonl is no JSON object"),
        ("x.json", b'["a", "b"]', "row 0 of x.json is no JSON object"),
        ("x.json", b'{\n"version": 1, "data": [{"prompt": "a"}]}', "one JSON object with the keys version, data"),
        ("x.jsonl", TEXT + b'{"prompt": "\\ud83d"}\n', "line 3 of x.jsonl: `prompt` holds half a character"),
        ("x.jsonl", b'{"prompt":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        ("x.jsonl.gz", TEXT, "x.jsonl.gz: Not a gzipped file"),
        ("x.jsonl.gz", gzip.compress(TEXT, mtime=0)[:-12], "x.jsonl.gz is cut off or damaged"),
        ("x.jsonl.xz", lzma.compress(TEXT)[:-12], "x.jsonl.xz is cut off or damaged"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path, name, content, said, streaming, capsys):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        main(["prepare-data", str(tmp_path / name), "--output_dir", str(tmp_path / "out"), "--no_length", *streaming])
    assert stop.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(f"luffy-trl prepare-data: error: {tmp_path / name} cannot be read: ")
    assert said in last
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("command", ["train", "sft"])
@pytest.mark.parametrize("content", [b"", b"prompt,completion,solution\n", "prompt\ncaf\xe9\n".encode("cp1252")])
def test_training_says_so_too(tmp_path, content, command, capsys):
    (tmp_path / "x.csv").write_bytes(content)
    said = "is not UTF-8 text" if b"\xe9" in content else "it holds no rows"
    assert said in refusal(command, tmp_path / "x.csv", capsys)
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), tmp_path / "x.parquet")
    assert "it holds no rows" in refusal(command, tmp_path / "x.parquet", capsys)


# Digits


NUMBERS = {
    "72": "72", "72.0": "72", "-3": "-3", "0.5": "0.5", "0.10": "0.1", "1E5": "100000",
    "1e-20": "0.00000000000000000001",
    "9007199254740993": "9007199254740993", "12345678901234567890": "12345678901234567890",
    "-98765432109876543210987654321": "-98765432109876543210987654321",
    "0.1234567890123456789012345": "0.1234567890123456789012345", "1e-400": "1e-400", "1e400": "1e400", "-0.0": "0",
    "1" + "0" * 5000: "1" + "0" * 5000, "0.30000000000000004": "0.30000000000000004",
}  # fmt: skip


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "together", [["72", "null"], ["72.0", "null"], ['"x"', "5"], *[[n] for n in NUMBERS], NUMBERS]
)
def test_json_keeps_the_digits_of_a_gold_answer(tmp_path, together, streaming):
    text = "".join(f'{{"prompt": "a", "solution": {number}}}\n' for number in together)
    (tmp_path / "x.jsonl").write_text(text)
    expected = [{"null": None, '"x"': "x"}.get(number, NUMBERS.get(number, number)) for number in together]
    dataset = checked_rows(load_splits(str(tmp_path / "x.jsonl"), "it", streaming=streaming)["train"], "it")
    assert [row["solution"] for row in dataset] == expected


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        (["72.0", "", "0.5"], ["72", None, "0.5"]),  # as pandas writes whole numbers beside a missing one
        (["72", "NA", "nan"], ["72", None, None]),
        (["NA", "x", "None"], ["NA", "x", "None"]),  # an answer may be called so
        (["5", "x + 1", ""], ["5", "x + 1", None]),
        (["007", "8"], ["007", "8"]),
        (["12345678901234567890", "1"], ["12345678901234567890", "1"]),
        (["9007199254740993", "5"], ["9007199254740993", "5"]),
        (["1e-30", "0.1"], ["0." + "0" * 29 + "1", "0.1"]),
        (["1,234", "7"], ["1,234", "7"]),
        (["True", "5"], ["True", "5"]),
    ],
)
def test_csv_keeps_the_digits_of_a_gold_answer(tmp_path, cells, expected, streaming):
    (tmp_path / "x.csv").write_text("prompt,solution\n" + "".join(f'a,"{cell}"\n' for cell in cells))
    dataset = checked_rows(load_splits(str(tmp_path / "x.csv"), "it", streaming=streaming)["train"], "it")
    assert [row["solution"] for row in dataset] == expected


COLUMNS = [
    (pa.array([72.0, None, 0.1, float("nan")]), ["72", None, "0.1", None]),
    (pa.array([72.0, 0.1, 1e-7], pa.float32()), ["72", "0.1", "0.0000001"]),
    (pa.array([np.float16(0.1), np.float16(3)], pa.float16()), ["0.1", "3"]),
    (pa.array([2**64 - 1, 1], pa.uint64()), ["18446744073709551615", "1"]),
    (pa.array([2**53 + 1, None]), ["9007199254740993", None]),
    (pa.array([Decimal("72.00"), None, Decimal("0.05")], pa.decimal128(38, 2)), ["72", None, "0.05"]),
    (pa.array([Decimal("7" * 60)], pa.decimal256(76, 0)), ["7" * 60]),
    (pa.array([Decimal("0." + "0" * 29 + "1")], pa.decimal128(38, 30)), ["0." + "0" * 29 + "1"]),
    (pa.array(["72.0", "x"]), ["72.0", "x"]),  # texts are left alone
]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("column", "expected"), COLUMNS, ids=lambda value: str(getattr(value, "type", "")))
def test_parquet_keeps_the_digits_of_a_gold_answer(tmp_path, column, expected, streaming):
    path = table(tmp_path / "x.parquet", {"prompt": ["a"] * len(column), "solution": column, "n": column})
    dataset = checked_rows(load_splits(str(path), "it", streaming=streaming)["train"], "it")
    assert [row["solution"] for row in dataset] == expected
    assert next(iter(dataset))["n"] == column[0].as_py()  # other columns stay as they are


def test_prepare_data_keeps_them_too(tmp_path):
    for i, (column, expected) in enumerate(COLUMNS):
        texts = [f"problem {i}" for i in range(len(column))]
        path = table(tmp_path / f"{i}.parquet", {"q": texts, "a": ["\\boxed{1}"] * len(column), "s": column})
        own = ["--prompt_column", "q", "--demonstration_column", "a", "--solution_column", "s"]
        main(["prepare-data", str(path), "--output_dir", str(tmp_path / "out"), "--no_length", "--no_verify",
              "--overwrite", *own])  # fmt: skip
        kept = datasets.load_dataset("parquet", data_dir=str(tmp_path / "out" / "data"), split="train")["solution"]
        assert list(kept) == [text for text in expected if text is not None]


def test_a_column_of_whole_numbers_that_pandas_wrote(tmp_path):
    frame = pd.DataFrame({"prompt": ["a", "b", "c"], "solution": [72, None, 5]})
    frame.to_csv(tmp_path / "x.csv")
    frame.to_json(tmp_path / "x.jsonl", orient="records", lines=True)
    frame.to_parquet(tmp_path / "x.parquet")
    for path in tmp_path.glob("x.*"):
        dataset = checked_rows(load_splits(str(path), "it")["train"], "it")
        assert list(dataset["solution"]) == ["72", None, "5"], path.name


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("number", ["Infinity", "-Infinity"])
def test_an_infinity_is_refused_by_row(tmp_path, number, streaming):
    (tmp_path / "x.jsonl").write_text(f'{{"prompt": "a", "solution": 1}}\n{{"prompt": "a", "solution": {number}}}')
    with pytest.raises(ValueError, match=r"^it, row 1: `solution` is -?inf, expected a number or a text"):
        checked_rows(load_splits(str(tmp_path / "x.jsonl"), "it", streaming=streaming)["train"], "it")


def test_exact_text_is_the_number():
    for number in (0.1, 1e22, 1e16, 5e-324, 1.7976931348623157e308, 123456789.125, -2.5, 3, Decimal("1E+2")):
        assert Decimal(exact_text(number)) == (Decimal(repr(number)) if isinstance(number, float) else number)


def test_other_columns_of_several_kinds_keep_what_they_hold(tmp_path):
    rows = [
        {"prompt": "a", "extra": 1, "deep": {"x": 1, "y": []}},
        {"prompt": "b", "extra": "1", "deep": {"x": 2}},
        {"prompt": "c", "extra": 0.5, "deep": None},
    ]
    assert read(lines(tmp_path / "x.jsonl", rows)) == [
        {"prompt": "a", "extra": "1", "deep": {"x": 1, "y": []}},
        {"prompt": "b", "extra": "1", "deep": {"x": 2, "y": None}},
        {"prompt": "c", "extra": "0.5", "deep": None},
    ]
    rows = [{"extra": [1, "a", {"b": None}]}, {"extra": "5"}, {"extra": {}}, {"extra": True}, {"extra": None}]
    assert read(lines(tmp_path / "y.jsonl", rows)) == rows


# Directories


@pytest.mark.parametrize("streaming", [False, True])
def test_a_directory_is_read_whole(tmp_path, streaming):
    for name in ("train/1.jsonl", "train/2.json", "dev/3.ndjson", "test-0.jsonl", "test-1.jsonl.gz"):
        lines(tmp_path / name, [{"prompt": name}])
    packed = tmp_path / "test-1.jsonl.gz"
    packed.write_bytes(gzip.compress(packed.read_bytes()))
    for name in ("README.md", ".hidden.jsonl", "notes.txt", "_base/x.csv"):  # no data
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    splits = load_splits(str(tmp_path), "it", streaming=streaming)
    assert {name: [row["prompt"] for row in rows] for name, rows in splits.items()} == {
        "train": ["train/1.jsonl", "train/2.json"],
        "validation": ["dev/3.ndjson"],
        "test": ["test-0.jsonl", "test-1.jsonl.gz"],
    }


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["a.jsonl", "b.parquet"], "files of several formats (a.jsonl, b.parquet), which are not read together"),
        (["train.csv", "test.tsv"], "files of several formats (test.tsv, train.csv)"),
        (["a/a.jsonl", "b.xlsx"], "files of several formats (a/a.jsonl, b.xlsx)"),
        (["b.xlsx"], "holds b.xlsx, which is not read"),
        (
            ["train.jsonl", "more.jsonl"],
            "train.jsonl, whose name says its split, and more.jsonl, whose name says none",
        ),
    ],
)
def test_or_it_is_refused(tmp_path, names, said, capsys):
    for name in names:
        if name.endswith(".parquet"):
            table(tmp_path / "data" / name, {"prompt": ["a"]})
        else:
            lines(tmp_path / "data" / name, [{"prompt": "a"}])
    for command in ("train", "sft"):
        assert said in refusal(command, tmp_path / "data", capsys)


def test_files_of_a_directory_have_the_same_columns(tmp_path):
    table(tmp_path / "1.parquet", {"prompt": ["a"], "solution": [1]})
    table(tmp_path / "2.parquet", {"prompt": ["a"]})
    with pytest.raises(ValueError, match=r"2.parquet has the columns prompt, but the first file has prompt, solution"):
        load_splits(str(tmp_path), "it")
