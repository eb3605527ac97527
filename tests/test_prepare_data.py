"""`luffy-trl prepare-data`: exactly the planted rows are dropped, each under its reason; nothing else is lost."""

import json
import re
from base64 import b64decode
from collections import Counter
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from luffy_trl.commands.cli import main
from luffy_trl.data.contract import to_contract
from luffy_trl.data.filters import BenchmarkIndex, normalize_problem, problem_key, word_ngrams
from luffy_trl.data.loading import load_splits
from luffy_trl.data.schemas import recognise

from .test_train_script import CPU, ROOT, build_text_model, run


MAX_TOKENS = 60
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen"]
BENCHMARK = f"A train leaves with {' '.join(WORDS)} cars. How many?"


def trace(answer, thought="so it is"):
    return f"<think>\n{thought}\n</think>\n\nThe answer is $\\boxed{{{answer}}}$."


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tiny model whose tokenizer knows the words of these problems."""
    directory = tmp_path_factory.mktemp("text-model")
    build_text_model([trace(7), BENCHMARK, "What is 1 + 1? two words so it is hm hm hm"] * 20, directory)
    return directory


@pytest.fixture(scope="module")
def longest(model) -> str:
    """A trace of exactly MAX_TOKENS tokens, EOS included."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    for words in range(MAX_TOKENS):
        text = trace(17, " hm" * words)
        # The template of this tokenizer ends the prompt with <think>\n, which is not repeated
        if len(tokenizer(text.removeprefix("<think>\n"))["input_ids"]) + 1 == MAX_TOKENS:
            return text
    raise AssertionError("no number of words gives that length")


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory) -> Path:
    """In LUFFY's schema, where the system prompt is no part of the problem."""
    path = tmp_path_factory.mktemp("benchmark") / "benchmark.parquet"
    row = luffy(BENCHMARK, None, "42") | {"data_source": "exam"}
    del row["target"]
    pq.write_table(pa.Table.from_pylist([row]), path)
    return path


def luffy(problem, text, gold, index=0):
    """A row of Elliott/Openr1-Math-46k-8192."""
    system = {"role": "system", "content": f"Think first. {' '.join(WORDS)}"}
    return {
        "data_source": "math",
        "prompt": [system, {"role": "user", "content": problem}],
        "target": text if text is None else [{"role": "assistant", "content": text}],
        "ability": "math",
        "reward_model": {"ground_truth": gold, "style": "rule"},
        "extra_info": {"index": index, "split": "default"},
    }


def openr1(problem, generations, answer, complete=None, right=None, uuid="u"):
    """A row of open-r1/OpenR1-Math-220k."""
    count = len(generations) if isinstance(generations, list) else 0
    return {
        "problem": problem,
        "solution": "a solution in words",
        "answer": answer,
        "problem_type": "Algebra",
        "question_type": "math-word-problem",
        "source": "olympiads",
        "uuid": uuid,
        "is_reasoning_complete": [True] * count if complete is None else complete,
        "generations": generations,
        "correctness_math_verify": [True] * count if right is None else right,
        "correctness_llama": None,
        "finish_reasons": None,
        "correctness_count": count,
        "messages": [{"role": "user", "content": problem}],
    }


def write(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    return path


def prepare(source, output, *options, tokenizer=None) -> None:
    length = ["--tokenizer", tokenizer, "--max_tokens", MAX_TOKENS] if tokenizer else ["--no_length"]
    main(["prepare-data", *map(str, [source, "--output_dir", output, *length, *options])])


def result(output):
    """(rows kept, reason of each dropped row by its number)."""
    kept = list(datasets.load_dataset(str(output), split="train"))
    dropped = [json.loads(line) for line in (output / "dropped.jsonl").read_text().splitlines()]
    return kept, {note["row"]: note["reason"] for note in dropped}


def counts(text: str) -> dict[str, tuple[int, int]]:
    """The card's table: what -> rows, demonstrations."""
    lines = re.findall(r"^\| ([a-z ]+) \| ([\d,]+) \| ([\d,]+) \|$", text, re.MULTILINE)
    return {what: (int(rows.replace(",", "")), int(demos.replace(",", ""))) for what, rows, demos in lines}


# The two published schemas


@pytest.fixture
def planted_luffy(longest):
    """Rows, and what each is dropped for; None: it is kept."""
    twelve = " ".join(WORDS[:12])
    plan = [
        (luffy("What is $1 + 1$?", trace(2), "2"), None),
        (luffy("  what is \\left( 1+1 \\right)?", trace(2), "2"), None),  # brackets are not layout
        (luffy("What is 1+1", trace(2), "2"), "duplicate"),
        (luffy("What is 1 - 1?", trace(0), "0"), None),
        (luffy("Find 3 + 4.", trace(8), "7"), "not verified"),  # the first copy is no good ...
        (luffy("Find 3 + 4.", trace(7), "7"), None),  # ... so this is not its duplicate
        (luffy("What is one half?", trace("\\frac{1}{2}"), "0.5"), None),
        (luffy("It never ends", "<think>\nso it is \\boxed{5}", "5"), "not verified"),
        (luffy("As long as allowed", longest, "17"), None),
        (luffy("Too long", longest.replace("\n</think>", " hm\n</think>"), "17"), "too long"),
        (luffy(BENCHMARK.upper(), trace(42), "42"), "contaminated"),
        (luffy(f"Tom has {' '.join(WORDS)} apples", trace(1), "1"), "contaminated"),
        (luffy(f"Tom has {twelve} apples", trace(1), "1"), None),
        (luffy("No demonstration", None, "1"), "no demonstration"),
        (luffy("An empty one", "  ", "1"), "malformed demonstration"),
        (luffy("Its EOS comes early", trace("1<|im_end|>"), "1"), "malformed demonstration"),
        (luffy("No gold", trace(1), None), "gold answer missing"),
        (luffy("Blank gold", trace(1), " "), "gold answer missing"),
        (luffy(None, trace(1), "1"), "malformed prompt"),
        (luffy(" ", trace(1), "1"), "malformed prompt"),
        (luffy("No prompt", trace(1), "1") | {"prompt": None}, "malformed prompt"),
        (
            luffy("No target", trace(1), "1") | {"target": [{"role": "user", "content": "a"}]},
            "malformed demonstration",
        ),
    ]
    for index, (row, _) in enumerate(plan):
        row["extra_info"]["index"] = index
    return [row for row, _ in plan], {i: reason for i, (_, reason) in enumerate(plan) if reason}


def test_exactly_the_planted_rows_of_luffys_schema_are_dropped(tmp_path, planted_luffy, model, benchmark, capsys):
    rows, planted = planted_luffy
    source, output = write(tmp_path / "train.parquet", rows), tmp_path / "out"
    prepare(source, output, "--benchmarks", benchmark, "--num_proc", 2, tokenizer=model)
    kept, dropped = result(output)
    assert dropped == planted
    assert [int(row["id"]) for row in kept] == [i for i in range(len(rows)) if i not in planted]
    for row in kept:
        original = rows[int(row["id"])]
        assert row["prompt"] == original["prompt"]
        assert row["completion"] == original["target"]
        assert (row["solution"], row["source"]) == (original["reward_model"]["ground_truth"], "math")

    table = counts((output / "README.md").read_text())
    read, kept_counts = table.pop("read"), table.pop("kept")
    assert read == (len(rows), len(rows) - 6)  # one has none, and in five the prompt or the gold answer is no use
    assert kept_counts == (len(kept), len(kept))
    assert {reason: count for reason, (count, _) in table.items() if count} == Counter(planted.values())
    assert [sum(column) for column in zip(kept_counts, *table.values(), strict=True)] == list(read)
    shown = capsys.readouterr().out
    for reason, (rows_, demonstrations) in table.items():
        assert re.search(rf"^{reason} +{rows_} +{demonstrations}$", shown, re.MULTILINE)


def test_rows_of_the_wrong_types_are_counted_not_raised(tmp_path, model):
    good = luffy("What is 1 + 1?", trace(2), "2")
    plan = [
        (good, None),
        (good | {"prompt": "What is 2 + 2?"}, "malformed prompt"),
        (good | {"prompt": 3}, "malformed prompt"),
        (good | {"prompt": ["What?"]}, "malformed prompt"),
        (good | {"prompt": [{"role": "user", "content": 3}]}, "malformed prompt"),
        (good | {"target": "a text alone"}, "malformed demonstration"),
        (good | {"target": [3]}, "malformed demonstration"),
        (good | {"reward_model": "2"}, "gold answer missing"),
        (good | {"reward_model": {"ground_truth": [2]}}, "gold answer missing"),
        (good | {"reward_model": {"ground_truth": True}}, "gold answer missing"),
        (luffy("What is 1 + 2?", trace(3), "3") | {"reward_model": {"ground_truth": 3}}, None),  # a number is one
        ({"prompt": good["prompt"], "target": good["target"], "reward_model": None}, "gold answer missing"),
    ]
    prepare(write(tmp_path / "train.jsonl", [row for row, _ in plan]), tmp_path / "out", tokenizer=model)
    kept, dropped = result(tmp_path / "out")
    assert dropped == {i: reason for i, (_, reason) in enumerate(plan) if reason}
    assert [row["solution"] for row in kept] == ["2", "3"]


@pytest.fixture
def planted_openr1(longest):
    long = longest.replace("\n</think>", " hm\n</think>")
    plan = [
        (openr1("What is 1 + 1?", [trace(2), trace(3), trace("2.0")], "2"), None),
        (openr1("What is 1+1?", [trace(2)], "2"), "duplicate"),
        (openr1("Find 3 + 4.", [trace(7), trace(7, "cut off")], "7", complete=[True, False]), None),
        (openr1("Find 3 + 5.", [trace(8)], "8", complete=[False]), "unfinished reasoning"),
        (openr1("Find 3 + 6.", [trace(9), trace(8)], "9", right=[False, True]), None),  # we judge, not the source
        (openr1("Find 3 + 7.", [trace(0), trace(1)], "10"), "not verified"),
        (openr1("Find 8 + 9.", [long, trace(17)], "17"), None),
        (openr1("Find 9 + 8.", [long], "17"), "too long"),
        (openr1("Find 9 + 9.", [trace(0), long], "17"), "not verified"),  # under the last of its demonstrations
        (openr1(BENCHMARK, [trace(42)], "42"), "contaminated"),
        (openr1("No traces", [], "1"), "no demonstration"),
        (openr1("None at all", None, "1"), "no demonstration"),
        (openr1("Half a trace", [None, trace(1)], "1"), None),
        (openr1("Blank", [" "], "1"), "malformed demonstration"),
        (openr1("Flags missing", [trace(1), trace(1)], "1", complete=[True]), "malformed demonstration"),
        (openr1(None, [trace(1)], "1"), "malformed prompt"),
        (openr1("No answer", [trace(1)], None), "gold answer missing"),
    ]
    for index, (row, _) in enumerate(plan):
        row["uuid"] = str(index)
    return [row for row, _ in plan], {i: reason for i, (_, reason) in enumerate(plan) if reason}


KEPT_TRACES = {0: [trace(2), trace("2.0")], 2: [trace(7)], 4: [trace(9)], 6: [trace(17)], 12: [trace(1)]}


@pytest.mark.parametrize("options", [["--num_proc", 1], ["--num_proc", 3], ["--streaming"]])
def test_exactly_the_planted_rows_and_traces_of_openr1_are_dropped(
    tmp_path, planted_openr1, model, benchmark, options
):
    rows, planted = planted_openr1
    source, output = write(tmp_path / "train.parquet", rows), tmp_path / "out"
    prepare(source, output, "--benchmarks", benchmark, *options, tokenizer=model)
    kept, dropped = result(output)
    assert dropped == planted
    assert {int(row["id"]): [d[0]["content"] for d in row["demonstrations"]] for row in kept} == KEPT_TRACES
    assert kept[0]["prompt"] == [{"role": "user", "content": "What is 1 + 1?"}]
    assert (kept[0]["solution"], kept[0]["source"]) == ("2", "olympiads")
    table = counts((output / "README.md").read_text())
    # 24 traces in rows that could be read; 6 of them stay
    assert (table["read"], table["kept"]) == ((17, 20), (5, 6))
    assert [sum(column) for column in zip(*table.values(), strict=True)] == [2 * 17, 2 * 20]


def test_the_sources_verdicts_can_be_trusted(tmp_path):
    rows = [openr1("a", [trace(9), trace(8)], "9", right=[False, True]), openr1("b", [trace(1)], "1", right=[False])]
    prepare(write(tmp_path / "train.jsonl", rows), tmp_path / "out", "--trust_source")
    kept, dropped = result(tmp_path / "out")
    assert [d[0]["content"] for d in kept[0]["demonstrations"]] == [trace(8)]
    assert dropped == {1: "not verified"}


# The user's own columns


def test_own_columns_stay_texts_and_lists_become_several(tmp_path, capsys):
    rows = [
        {"question": "1 + 1?", "steps": ["No answer here.", "So \\boxed{2}"], "result": 2, "source": "me", "id": 7},
        {"question": "2 + 2?", "steps": ["\\boxed{5}"], "result": 4, "source": None, "id": 8},
    ]
    rows = [row | {"unit": "m", "level": 1} for row in rows]
    own = ["--prompt_column", "question", "--demonstration_column=steps", "--solution_column=result"]
    prepare(write(tmp_path / "train.jsonl", rows), tmp_path / "out", *own)
    kept, dropped = result(tmp_path / "out")
    expected = {"prompt": "1 + 1?", "demonstrations": ["So \\boxed{2}"], "solution": "2", "source": "me", "id": "7"}
    assert kept == [expected]
    assert dropped == {1: "not verified"}
    assert "Columns that are left out: level, unit\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "system"),
    [([], ["Old."]), (["--system_prompt", "New."], ["New."]), (["--no_system_prompt"], [])],
)
def test_the_system_prompt_is_kept_replaced_or_taken_out(tmp_path, option, system):
    prompt = [{"role": "system", "content": "Old."}, {"role": "user", "content": "1 + 1?"}]
    rows = [{"prompt": prompt, "completion": [{"role": "assistant", "content": "\\boxed{2}"}], "solution": "2"}]
    prepare(write(tmp_path / "train.jsonl", rows), tmp_path / "out", *option)
    [row] = result(tmp_path / "out")[0]
    assert [m["content"] for m in row["prompt"] if m["role"] == "system"] == system
    assert row["prompt"][-1] == prompt[-1]


def test_texts_become_messages_on_request(tmp_path):
    rows = [{"prompt": "1 + 1?", "completion": "\\boxed{2}", "solution": "2"}]
    source = write(tmp_path / "train.jsonl", rows)
    prepare(source, tmp_path / "out", "--conversational", "--system_prompt", "Be brief.")
    [row] = result(tmp_path / "out")[0]
    assert [message["role"] for message in row["prompt"]] == ["system", "user"]
    assert row["completion"] == [{"role": "assistant", "content": "\\boxed{2}"}]


def test_every_filter_can_be_left_out_and_the_card_says_so(tmp_path):
    rows = [luffy("a", trace(2), "1"), luffy("a", trace(1), "1"), luffy(BENCHMARK, trace(1), "1")]
    options = ["--no_verify", "--no_deduplicate", "--max_rows", 2]
    prepare(write(tmp_path / "train.jsonl", rows), tmp_path / "out", *options)
    assert len(result(tmp_path / "out")[0]) == 2
    card = (tmp_path / "out" / "README.md").read_text()
    for line in (
        "contaminated: not checked, no --benchmarks",
        "too long: not checked, --no_length",
        "not verified: not checked, --no_verify",
        "duplicate: not checked, --no_deduplicate",
    ):
        assert f"| {line} | - | - |" in card
    assert "licence of train.jsonl is not known" in card
    assert str(tmp_path) not in card
    assert "\nlicense:" not in card


# What comes in and what goes out


@pytest.mark.parametrize("kind", ["csv", "saved", "saved_splits", "directory"])
def test_other_places_to_read_from(tmp_path, kind):
    rows = datasets.Dataset.from_list([{"prompt": "1 + 1?", "completion": "\\boxed{2}", "solution": "2"}])
    source = tmp_path / f"source{'.csv' if kind == 'csv' else ''}"
    if kind == "csv":
        rows.to_csv(source)
    elif kind == "saved":
        rows.save_to_disk(source)
    elif kind == "saved_splits":
        datasets.DatasetDict(train=rows, test=rows).save_to_disk(source)
    else:
        source.mkdir()
        rows.to_parquet(source / "train.parquet")
    prepare(source, tmp_path / "out")
    assert [row["solution"] for row in result(tmp_path / "out")[0]] == ["2"]


@pytest.mark.parametrize("streaming", [[], ["--streaming"]])
@pytest.mark.parametrize(
    ("name", "content", "cause"),
    [
        ("data.jsonl", b'{"problem": "a", "ans', "JSON parse error"),
        ("data.json", b"\xff\xfe\x00", ""),
        ("data.parquet", b"PAR1 or so", "not a parquet file"),
        ("data.csv", b'prompt,completion\n1,2\n"3,4\n', "EOF inside string"),
        ("data.jsonl", b"", "it holds no rows"),
    ],
)
def test_a_malformed_file_is_one_sentence(tmp_path, capsys, name, content, cause, streaming):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit) as exit_:
        prepare(tmp_path / name, tmp_path / "out", *streaming)
    assert exit_.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(f"luffy-trl prepare-data: error: {tmp_path / name} cannot be read: ")
    assert cause in last
    assert [path.name for path in tmp_path.iterdir()] == [name]  # nothing half-written


def test_a_stream_that_breaks_later_leaves_nothing_behind(tmp_path, capsys):
    good = json.dumps({"prompt": "1 + 1?", "completion": "\\boxed{2}", "solution": "2", "filler": "x" * 1000})
    source = tmp_path / "data.jsonl"
    source.write_text("\n".join([good] * 20_000) + '\n{"prompt": "bro')  # beyond the first block that is read
    with pytest.raises(SystemExit) as exit_:
        prepare(source, tmp_path / "out", "--streaming", "--no_verify")
    assert exit_.value.code == 2
    assert "data.jsonl cannot be read: JSON parse error" in capsys.readouterr().err.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt_column", "a"], "go together: give all three"),
        (["--config", "all"], "so it has no configuration 'all' to choose"),
        (["--tokenizer", "no/such"], "--tokenizer no/such cannot be loaded: "),
        (["--split", "test"], "has no split 'test', only 'train'. Choose with --split."),
        (["--benchmarks", "no.parquet"], "--benchmarks no.parquet: there is no such file"),
        (["--max_tokens", "0"], "'0' must be a whole number of 1 or more"),
        (["--ngram_size", "-1"], "--ngram_size -1 must be 0 or more"),
        (["--trust_source"], "has no verdicts of its own"),
        (["--push_to_hub", "a/b/c"], "--push_to_hub a/b/c: Repo id must be in the form"),
        (["--public"], "--push_to_hub, which is missing"),
        (["--no-such-flag"], "unrecognized arguments: --no_such_flag"),
        (["--system_prompt", "Think."], "--system_prompt needs messages"),
        (
            ["--prompt_column", "q", "--demonstration_column", "completion", "--solution_column", "s"],
            "has the columns prompt, completion, solution, but no q and no s: name yours",
        ),
    ],
)
def test_wrong_arguments_end_with_one_line(tmp_path, capsys, options, message):
    source = write(tmp_path / "d.jsonl", [{"prompt": "1?", "completion": "2", "solution": "2"}])
    length = [] if "--tokenizer" in options else ["--no_length"]
    with pytest.raises(SystemExit) as exit_:
        main(["prepare-data", str(source), "--output_dir", str(tmp_path / "out"), *length, *options])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_the_tokenizer_is_asked_for(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["prepare-data", "d.jsonl", "--output_dir", str(tmp_path)])
    assert "--tokenizer is missing" in capsys.readouterr().err


def test_only_its_own_output_is_replaced(tmp_path, capsys):
    source, output = write(tmp_path / "d.jsonl", [luffy("a", trace(1), "1")]), tmp_path / "out"
    prepare(source, output)
    for options, extra, message in [
        ([], None, "is not empty. Choose another one, or replace it with --overwrite"),
        (["--overwrite"], "thesis.tex", "holds thesis.tex, which prepare-data did not write"),
    ]:
        if extra:
            (output / extra).touch()
        with pytest.raises(SystemExit):
            prepare(source, output, *options)
        assert message in capsys.readouterr().err
    (output / "thesis.tex").unlink()
    prepare(write(source, [luffy("b", trace(2), "2")]), output, "--overwrite")
    assert [row["solution"] for row in result(output)[0]] == ["2"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.jsonl", "out"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["README.md", "data/raw.txt"], "holds data/raw.txt, which prepare-data did not write"),
        (["README.md", "dropped.jsonl", "data/train.parquet"], "holds data/train.parquet, which prepare-data did not"),
        (["README.md", "data/train-00000.parquet"], "without dropped.jsonl it is not known to be prepare-data's"),
    ],
)
def test_what_it_did_not_write_stays(files, message, tmp_path, capsys):
    for name in files:
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text("mine")
    source = write(tmp_path / "d.jsonl", [luffy("a", trace(1), "1")])
    with pytest.raises(SystemExit) as stop:
        prepare(source, tmp_path / "out", "--overwrite")
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert all((tmp_path / "out" / name).read_text() == "mine" for name in files)


@pytest.mark.parametrize("output", [".", "..", "{cwd}", "new/..", "mounted"])
def test_a_directory_that_cannot_be_replaced_is_refused_before_the_work(output, tmp_path, monkeypatch, capsys):
    (tmp_path / "cwd" / "mounted").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setattr("os.path.ismount", lambda path: path == tmp_path / "cwd" / "mounted")
    with pytest.raises(SystemExit) as stop:
        prepare("no-such-source.jsonl", output.format(cwd=tmp_path / "cwd"))
    assert stop.value.code == 2
    assert "it cannot be replaced as a whole. Give a directory inside it" in capsys.readouterr().err


def test_a_link_leads_to_the_output(tmp_path):
    source = write(tmp_path / "d.jsonl", [luffy("a", trace(1), "1")])
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "out")
    prepare(source, tmp_path / "link")
    prepare(source, tmp_path / "link", "--overwrite")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "out" / "dropped.jsonl").is_file()


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as a push needs. It refuses every repository but me/prepared."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.server.asked.append((self.path, body))
        if self.path == "/api/repos/create":
            return self.answer(200 if json.loads(body)["name"] == "prepared" else 403, {"url": self.server.repo})
        if self.path.endswith("/preupload/main"):
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": files})
        return self.answer(200, {"commitOid": "0" * 40, "commitUrl": f"{self.server.repo}/commit/0", "warnings": []})

    def answer(self, status, content):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = HTTPServer(("127.0.0.1", 0), Hub)
    endpoint = f"http://127.0.0.1:{server.server_port}"
    server.asked, server.repo = [], f"{endpoint}/datasets/me/prepared"
    Thread(target=server.serve_forever, daemon=True).start()
    for name, value in {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_secret"}.items():
        monkeypatch.setenv(name, value)
    yield server
    server.shutdown()
    server.server_close()


def push(tmp_path, repo_id):
    write(tmp_path / "d.jsonl", [luffy("a", trace(1), "1")])
    arguments = ["d.jsonl", "--no_length", "--output_dir", "out", "--push_to_hub", repo_id]
    return run("-m", "luffy_trl", "prepare-data", *arguments, cwd=tmp_path)


def test_a_push_sends_the_whole_dataset_to_a_private_repository(tmp_path, hub):
    run_ = push(tmp_path, "me/prepared")
    assert run_.returncode == 0, run_.stderr
    assert f"Pushed to {hub.repo}" in run_.stdout
    asked = dict(hub.asked)
    assert json.loads(asked["/api/repos/create"])["visibility"] == "private"
    lines = [json.loads(line) for line in asked["/api/datasets/me/prepared/commit/main"].splitlines()]
    sent = {line["value"]["path"]: b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"}
    assert set(sent) == {"README.md", "dropped.jsonl", "data/train-00000.parquet"}
    assert all(content == (tmp_path / "out" / path).read_bytes() for path, content in sent.items())
    assert b'load_dataset("me/prepared"' in sent["README.md"]
    assert not any(b"hf_secret" in content for content in sent.values())


def test_a_refused_push_keeps_the_dataset_and_says_how_to_try_again(tmp_path, hub):
    run_ = push(tmp_path, "me/not-mine")
    assert run_.returncode == 1
    last = run_.stderr.strip().splitlines()[-1]
    assert last.startswith("The push to me/not-mine failed: ")
    assert "403" in last
    assert last.endswith("hf upload me/not-mine out . --repo-type dataset --private")
    assert len(result(tmp_path / "out")[0]) == 1


def test_ctrl_c_leaves_nothing_behind(tmp_path, monkeypatch):
    source = write(tmp_path / "d.jsonl", [luffy("a", trace(1), "1")])

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("luffy_trl.data.finishing.judge_math", interrupt)
    with pytest.raises(SystemExit, match="Nothing was written to"):
        prepare(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["d.jsonl"]


# Which problems are the same


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Find $x$ if $x+1=2$.", "find x if  x + 1 = 2", True),
        ("$\\dfrac{1}{2}$", "\\frac{1}{2}", True),
        ("\\left(a\\right)\\,b", "( a ) b", True),
        ("\uff11 + 1", "1+1", True),  # a full-width digit
        ("x + 1 = 2", "x - 1 = 2", False),
        ("a \\leftarrow b", "a arrow b", False),
        ("2^{10}", "2^{1}0", False),
        ("n!", "n", True),  # the price of ignoring closing punctuation
        ("n! + 1", "n + 1", False),
    ],
)
def test_problems_that_are_the_same(one, other, same):
    assert (normalize_problem(one) == normalize_problem(other)) == same
    assert (problem_key(one) == problem_key(other)) == same


def test_thirteen_shared_words_are_an_overlap():
    text = " ".join(WORDS)
    assert list(word_ngrams(f"{text}, Fourteen!", 13)) == [text, " ".join([*WORDS[1:], "fourteen"])]
    assert list(word_ngrams(" ".join(WORDS[:12]), 13)) == []
    index = BenchmarkIndex()
    index.add("exam", f"Say: {text}.")
    assert index.find(f"Never {text.upper()}") == f"shares with exam: {text}"
    assert index.find(f"Never {' '.join(WORDS[:6])} or {' '.join(WORDS[6:])}") is None
    assert BenchmarkIndex(ngram_size=0).find("") is None


@pytest.mark.shared_data
def test_every_real_benchmark_problem_is_found_in_training_data(tmp_path, shared_data, capsys):
    path = shared_data / "math_benchmarks.parquet"
    problems = [prompt[1]["content"] for prompt in pd.read_parquet(path)["prompt"]]
    rows = [luffy(f"  {problem} ", trace(1), "1") for problem in problems] + [luffy("What is 1 + 0?", trace(1), "1")]
    write(tmp_path / "train.parquet", rows)
    prepare(tmp_path / "train.parquet", tmp_path / "out", "--benchmarks", path)
    kept, dropped = result(tmp_path / "out")
    assert [row["prompt"][1]["content"] for row in kept] == ["What is 1 + 0?"]
    assert Counter(dropped.values()) == {"contaminated": 1590}
    assert "1,590 benchmark problems to keep out" in capsys.readouterr().out


# On to training


def test_schemas_are_recognised_by_their_columns():
    assert recognise(luffy("a", "b", "c")).name == "Openr1-Math-46k-8192"
    assert recognise(openr1("a", ["b"], "c")).name == "OpenR1-Math-220k"
    assert recognise(["prompt", "completion", "solution", "target"]) is None


@pytest.mark.slow
def test_the_result_trains_in_sft(tmp_path, model):
    rows = [openr1(f"What is 1 + {i}?", [trace(1 + i), trace(1 + i, "again")], str(1 + i)) for i in range(8)]
    options = ["--max_demonstrations", 1, "--system_prompt", "Think."]
    prepare(write(tmp_path / "train.parquet", rows), tmp_path / "out", *options, tokenizer=model)
    dataset = datasets.load_dataset(str(tmp_path / "out"), split="train")
    args = SFTConfig(output_dir=str(tmp_path / "sft"), max_steps=1, use_cpu=True, bf16=False, report_to="none")
    SFTTrainer(str(model), args=args, train_dataset=dataset).train()


@pytest.mark.parametrize("streaming", [False, True])
def test_the_published_schemas_are_converted_as_they_are_loaded(tmp_path, streaming, capsys):
    rows = [luffy("1 + 1?", trace(2), "2", index=4), luffy("No demonstration", None, "3"), luffy("No gold", "x", None)]
    source = str(write(tmp_path / "luffy.parquet", rows))
    dataset = to_contract(load_splits(source, source, streaming=streaming)["train"], "--dataset_name luffy.parquet")
    prompts = [row["prompt"] for row in rows]
    assert list(dataset) == [
        {"prompt": prompts[0], "completion": rows[0]["target"], "solution": "2", "source": "math", "id": "4"},
        {"prompt": prompts[1], "completion": None, "solution": "3", "source": "math", "id": "0"},
    ]
    rows = [openr1("1 + 1?", [trace(2), trace(3), "<think>"], "2", [True, True, False], [True, False, True], uuid="a")]
    source = str(write(tmp_path / "openr1.jsonl", rows))
    dataset = to_contract(load_splits(source, source, streaming=streaming)["train"], "--dataset_name openr1.jsonl")
    prompt, demonstration = [{"role": "user", "content": "1 + 1?"}], [{"role": "assistant", "content": trace(2)}]
    assert list(dataset) == [
        {"prompt": prompt, "demonstrations": [demonstration], "solution": "2", "source": "olympiads", "id": "a"}
    ]
    says = capsys.readouterr().out
    assert "--dataset_name luffy.parquet has the columns of Openr1-Math-46k-8192" in says
    if not streaming:
        assert "; 1 of 3 rows left out, the first of them row 2: `reward_model.ground_truth` is NoneType None" in says


def test_other_columns_are_left_alone(walks):
    assert to_contract(walks, "walks") is walks


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schema", "streaming"), [("luffy", []), ("openr1", ["--dataset_streaming"]), ("prepared", [])]
)
def test_train_reads_the_schemas_themselves(tmp_path, model, schema, streaming):
    sums = [(f"What is 1 + {i}?", trace(1 + i), str(1 + i)) for i in range(16)]
    if schema == "luffy":
        rows = [luffy(*row) for row in sums] + [luffy(None, trace(1), "1")]
    else:
        rows = [openr1(a, [b, trace(0)], c, right=[True, False]) for a, b, c in sums]
        rows.append(openr1("a", None, None))
    name = write(tmp_path / "train.parquet", rows)
    if schema == "prepared":
        name = tmp_path / "prepared"
        prepare(tmp_path / "train.parquet", name, tokenizer=model)
    run_ = run(
        ROOT / "train.py", "--model_name_or_path", model, "--dataset_name", name.name, *streaming,
        "--reward_funcs", "math_reward", "--output_dir", "out", "--num_generations", 4,
        "--per_device_train_batch_size", 8, "--max_completion_length", MAX_TOKENS, "--max_steps", 2,
        "--generation_kwargs", '{"max_new_tokens": 4}', "--logging_steps", 1, "--save_strategy", "no",
        "--gradient_checkpointing", "False", "--report_to", "none", *CPU, cwd=tmp_path,
    )  # fmt: skip
    assert run_.returncode == 0, run_.stderr[-3000:]
    assert run_.stdout.count("'off_policy/reward': '1'") == 2
    if schema != "prepared":
        assert run_.stdout.count("train.parquet has the columns of Open") == 1
        if not streaming:
            assert "; 1 of 17 rows left out, the first of them row 16: `" in run_.stdout
