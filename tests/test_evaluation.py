"""`luffy-trl eval` as a user starts it, its task definitions in the Hub's schemas, and its arithmetic by hand."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

import pandas as pd
import pytest
import torch
from datasets import Dataset, DatasetDict
from lm_eval.tasks import TaskManager
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from luffy_trl.commands.eval import main
from luffy_trl.evaluation import EvaluationError, tables
from luffy_trl.evaluation.catalog import TASKS, Catalog, configure
from luffy_trl.evaluation.comparison import paper_rows
from luffy_trl.evaluation.documents import shuffled_choices, to_documents
from luffy_trl.evaluation.lines import Sample, prompt_hash
from luffy_trl.evaluation.samples import SampleStore
from luffy_trl.evaluation.scoring import judge_responses
from luffy_trl.evaluation.tables import Summary, summarize
from luffy_trl.evaluation.templates import TEXT_TEMPLATES

from .conftest import HUNG, SAID


@pytest.fixture
def model_dir(speaking_model) -> Path:
    return speaking_model


@pytest.fixture
def data_file(tmp_path) -> Path:
    """Three problems of AIME 24 and two of MATH-500; the model is right about one of each."""
    path = tmp_path / "problems.jsonl"
    golds = {"aime": ["2", "3", "5"], "math": ["2", "7"]}
    with open(path, "w") as file:
        for source, answers in golds.items():
            for i, answer in enumerate(answers):
                prompt = [{"role": "system", "content": "Think."}, {"role": "user", "content": f"{source} {i}?"}]
                row = {"data_source": source, "prompt": prompt, "reward_model": {"ground_truth": answer}}
                file.write(json.dumps(row) + "\n")
    return path


def options(model_dir, data, output, **flags) -> list[str]:
    flags = {"max_new_tokens": 48, "batch_size": 16} | flags
    return ["--model", str(model_dir), "--data_files", str(data), "--output_dir", str(output)] + [
        part for name, value in flags.items() for part in (f"--{name}", str(value))
    ]


def kept_samples(output: Path) -> list[dict]:
    lines = [line for path in sorted((output / "samples").glob("*.jsonl")) for line in path.read_text().splitlines()]
    return [json.loads(line) for line in lines]


def error_of(arguments: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    [usage, last] = capsys.readouterr().err.strip().splitlines()[-2:]
    assert usage.startswith("usage: luffy-trl eval --model MODEL")
    assert last.startswith("luffy-trl eval: error: ")
    return last


# The whole command


@pytest.mark.shared_data
def test_the_six_mathematics_tasks_run_and_their_scores_equal_a_recount(shared_data, model_dir, tmp_path, capsys):
    output = tmp_path / "out"
    main(
        [
            *options(model_dir, shared_data / "math_benchmarks.parquet", output, limit=3, n_samples=4),
            "--compare",
            "paper",
        ]
    )
    printed = capsys.readouterr().out

    problems = pd.read_parquet(shared_data / "math_benchmarks.parquet").groupby("data_source").head(3)
    samples = kept_samples(output)
    assert Counter(Counter((s["task"], s["doc_id"]) for s in samples).values()) == {4: 9, 1: 9}
    assert sorted({s["problem"] for s in samples}) == sorted(prompt[1]["content"] for prompt in problems["prompt"])

    by_task: dict[str, dict[int, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for s in samples:  # without Math-Verify: the model writes one number, or nonsense
        by_task[s["task"]][s["doc_id"]].append("\\boxed{2}" in s["response"] and s["gold"] in ("2", "2.0"))
    results = json.loads((output / "results.json").read_text())
    recount = {task: sum(sum(r) / len(r) for r in of.values()) / 3 for task, of in by_task.items()}
    assert {task: result["score"] for task, result in results["tasks"].items()} == pytest.approx(recount)
    assert 0 < recount["luffy_olympiadbench"] < 1
    # lm-eval's own means and standard errors are the same
    for task, result in results["tasks"].items():
        assert results["lm_eval"][task]["score,none"] == pytest.approx(result["score"])
        assert results["lm_eval"][task]["score_stderr,none"] == pytest.approx(result["stderr"])

    average = 100 * sum(recount.values()) / 6
    assert results["percent"]["scores"]["luffy_math"] == pytest.approx(average)
    [line] = [line for line in printed.splitlines() if line.startswith(model_dir.name)]
    assert f"{average:.1f} ±" in line
    assert "LUFFY (paper)" in printed
    assert "50.1" in printed
    [repaired] = [line.split() for line in printed.splitlines() if line.startswith("SFT + RL, repaired")]
    assert repaired[-7:] == ["-"] * 6 + ["57.0"]
    assert "| LUFFY (paper) |" in (output / "results.md").read_text()


def test_lengths_and_truncation_are_of_the_tokens(model_dir, data_file, tmp_path):
    main(options(model_dir, data_file, tmp_path / "whole", temperature=0))
    main(options(model_dir, data_file, tmp_path / "cut", temperature=0, max_new_tokens=10))
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    whole, cut = kept_samples(tmp_path / "whole"), kept_samples(tmp_path / "cut")
    assert [s["response"] for s in whole] == [SAID] * 5  # greedy: one sample each, also of AIME
    assert [(s["tokens"], s["truncated"]) for s in whole] == [(len(tokenizer(SAID)["input_ids"]) + 1, False)] * 5
    assert [(s["tokens"], s["truncated"]) for s in cut] == [(10, True)] * 5
    main(options(model_dir, data_file, tmp_path / "mixed", temperature=1.5, n_samples=8))
    mixed = kept_samples(tmp_path / "mixed")
    assert {s["tokens"] for s in mixed if s["response"] == SAID} == {whole[0]["tokens"]}  # beside longer ones
    assert max(s["tokens"] for s in mixed) == 48
    results = json.loads((tmp_path / "cut" / "results.json").read_text())["tasks"]["luffy_math500"]
    assert (results["truncated"], results["unanswered"], results["score"]) == (1.0, 1.0, 0.0)


@pytest.mark.slow
def test_interrupted_and_killed_runs_go_on_where_they_were(model_dir, data_file, tmp_path, capsys):
    output = tmp_path / "out"
    # at T = 3 the model writes noise, so that no two responses are equal by chance
    command = options(model_dir, data_file, output, temperature=3.0, n_samples=12, chunk_size=2)

    def run_until(number: int, kill: signal.Signals) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", "from luffy_trl.commands.cli import main; main()", "eval", *command],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        path = output / "samples" / "luffy_aime24.jsonl"
        while process.poll() is None and (not path.exists() or path.read_bytes().count(b"\n") < number):
            time.sleep(0.01)
        process.send_signal(kill)
        process.out, process.err = process.communicate(timeout=HUNG)
        return process

    interrupted = run_until(2, signal.SIGINT)
    assert interrupted.returncode == 1
    first = {(s["task"], s["doc_id"], s["repeat"]): s["response"] for s in kept_samples(output)}
    assert f"Interrupted. {len(first)} of 38 samples are kept" in interrupted.err
    assert "Traceback" not in interrupted.err

    killed = run_until(len(first) + 2, signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL
    with open(output / "samples" / "luffy_aime24.jsonl", "a") as file:
        file.write('{"task": "luffy_aime24", "doc_id": 0, "rep')
    second = {(s["task"], s["doc_id"], s["repeat"]): s["response"] for s in kept_whole_lines(output)}
    assert 0 < len(first) < len(second) < 38
    assert first.items() <= second.items()

    main(command)
    printed = capsys.readouterr().out
    assert f"{len(second)} of 38 samples are kept" in printed
    assert "1 half-written samples of a killed run were made again" in printed
    samples = kept_samples(output)
    third = {(s["task"], s["doc_id"], s["repeat"]): s["response"] for s in samples}
    assert len(samples) == len(third) == 38
    assert second.items() <= third.items()  # nothing that was kept was made again
    assert len(set(third.values())) == 38  # and nothing was drawn twice, by repeats or by restarts


def kept_whole_lines(output: Path) -> list[dict]:
    lines = [part for path in (output / "samples").glob("*.jsonl") for part in path.read_text().split("\n")[:-1]]
    return [json.loads(line) for line in lines]


def test_a_finished_run_is_scored_anew_without_its_model_and_grows(model_dir, data_file, tmp_path, capsys):
    output = tmp_path / "out"
    command = options(model_dir, data_file, output, n_samples=1, limit=1, tasks="luffy_aime24")
    main(command)
    planted = output / "samples" / "luffy_aime24.jsonl"
    [sample] = kept_samples(output)
    assert sample["score"] == 1.0

    planted.write_text(json.dumps(sample | {"response": "\\boxed{2}"}) + "\n")  # no thought ends here
    main(command)
    assert kept_samples(output)[0]["score"] == 1.0
    main([*command, "--thought", "required"])
    [sample] = kept_samples(output)
    assert (sample["score"], sample.get("answer")) == (0.0, None)
    assert "Samples" not in capsys.readouterr().err.splitlines()[-1]

    main(options(model_dir, data_file, output, n_samples=2, temperature=0.6, name="grown"))
    assert kept_samples(output)[0]["response"] == "\\boxed{2}"
    assert len(kept_samples(output)) == 3 * 2 + 2
    assert "grown" in capsys.readouterr().out
    main(options(model_dir, data_file, output, n_samples=1, name="grown"))  # some of them
    assert json.loads((output / "results.json").read_text())["tasks"]["luffy_aime24"]["samples"] == 1
    assert len(kept_samples(output)) == 3 * 2 + 2
    assert "5 of 5 samples are kept" in capsys.readouterr().out
    main([*options(model_dir, data_file, tmp_path / "other", temperature=0), "--compare", str(output)])
    assert f"grown ({output})" in capsys.readouterr().out


def test_an_adapter_is_evaluated(model_dir, data_file, tmp_path):
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["down_proj"], init_lora_weights=False, lora_alpha=64)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir), config)
    model.save_pretrained(tmp_path / "adapter")
    main(options(model_dir, data_file, tmp_path / "out", temperature=0, adapter=tmp_path / "adapter"))
    assert SAID not in {s["response"] for s in kept_samples(tmp_path / "out")}
    by_argument = options(model_dir, data_file, tmp_path / "peft", temperature=0)
    main([*by_argument, "--model_args", f"peft={tmp_path / 'adapter'}"])
    assert [s["response"] for s in kept_samples(tmp_path / "peft")] == [
        s["response"] for s in kept_samples(tmp_path / "out")
    ]


# Prompts


def test_prompts_are_the_templates(model_dir, data_file, tmp_path):
    def hash_of(name: str, **flags) -> str:
        main(options(model_dir, data_file, tmp_path / name, temperature=0, limit=1, tasks="luffy_aime24", **flags))
        return kept_samples(tmp_path / name)[0]["prompt_hash"]

    chatml = "<|im_start|>user\naime 0?<|im_end|>\n<|im_start|>assistant\n<think>\n"
    assert hash_of("own") == prompt_hash(chatml)
    assert hash_of("data", system_prompt="data") == prompt_hash(f"<|im_start|>system\nThink.<|im_end|>\n{chatml}")
    assert hash_of("own_text", system_prompt="Go.") == prompt_hash(f"<|im_start|>system\nGo.<|im_end|>\n{chatml}")
    assert hash_of("plain", template="plain") == prompt_hash("aime 0?")
    assert hash_of("r1", template="r1_zero") == prompt_hash(TEXT_TEMPLATES["r1_zero"]("aime 0?"))
    assert TEXT_TEMPLATES["r1_zero"]("1?").endswith("\nUser: 1?\nAssistant: <think>")
    assert TEXT_TEMPLATES["qwen_math"]("1?") == (
        "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
        "<|im_start|>user\n1?<|im_end|>\n<|im_start|>assistant\n"
    )


# Task definitions

ROW = {"problem": "1 + 1?", "question": "1 + 1?", "Question": "1 + 1?"}
HUB_ROWS = {
    "luffy_aime24": ROW | {"answer": "2"},
    "luffy_aime25": ROW | {"answer": "2"},
    "luffy_amc": ROW | {"answer": 2.0},
    "luffy_math500": ROW | {"answer": "2"},
    "luffy_minerva": ROW | {"answer": "2"},
    "luffy_olympiadbench": ROW | {"final_answer": ["$2$"]},
    "luffy_arc_c": ROW | {"choices": {"text": ["1", "2", "3"], "label": ["1", "2", "3"]}, "answerKey": "2"},
    "luffy_gpqa_diamond": ROW
    | {"Correct Answer": "2\n", "Incorrect Answer 1": "1", "Incorrect Answer 2": "3", "Incorrect Answer 3": "4"},
    "luffy_mmlu_pro": ROW | {"options": [str(i) for i in range(10)], "answer_index": 2},
}


@pytest.mark.parametrize("name", HUB_ROWS)
def test_a_definition_reads_its_hub_dataset_and_scores_by_itself(name, monkeypatch):
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    config = manager.task_index[name].cfg
    asked = []

    def load_dataset(path, name=None, **kwargs):
        asked.append((path, name))
        return DatasetDict({config["test_split"]: Dataset.from_list([HUB_ROWS[config["task"]]])})

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    [task] = manager.load([name])["tasks"].values()
    assert asked == [(config["dataset_path"], config.get("dataset_name"))]
    [document] = task.eval_docs
    assert document["problem"].startswith("1 + 1?")
    target = document["answer"]
    if config["metadata"]["kind"] == "choice":
        assert f"\n{target}) 2\n" in document["problem"]
    else:
        assert float(target) == 2
    assert task.doc_to_text(document) == document["problem"]
    assert task.process_results(document, [[f"\\boxed{{{target}}}", "\\boxed{Z9}"]]) == {"score": 0.5}
    generation = task.config.generation_kwargs
    assert (generation["temperature"], generation["max_gen_toks"], generation["until"]) == (0.6, 8192, [])
    assert task.config.repeats == (32 if name in ("luffy_aime24", "luffy_aime25", "luffy_amc") else 1)


def test_what_the_command_line_decides_reaches_the_task():
    documents = to_documents(["1 + 1?"], ["2"])

    def generation(temperature: float) -> dict:
        task = Catalog().task_from_documents("luffy_math500", {"math": documents})
        configure(task, 3, temperature, 0.9, 100, lambda document, results: {})
        assert task.config.repeats == 3
        return task.config.generation_kwargs

    off = {"until": [], "repetition_penalty": 1.0, "max_gen_toks": 100}
    assert generation(0.7) == off | {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 0}
    assert generation(0) == off | {"do_sample": False, "temperature": 0}


def test_the_catalog_holds_the_papers_two_tables():
    catalog = Catalog()
    assert [catalog.benchmarks[name].label for name in catalog.groups["luffy_math"].benchmarks] == [
        "AIME 24", "AIME 25", "AMC", "MATH-500", "Minerva", "Olympiad",
    ]  # fmt: skip
    assert catalog.expand(["luffy_ood", "luffy_arc_c"]) == ["luffy_arc_c", "luffy_gpqa_diamond", "luffy_mmlu_pro"]
    assert set(catalog.benchmarks) == set(HUB_ROWS)


def test_the_documentation_lists_the_benchmarks_as_they_are():
    documentation = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text()
    lines = {line.split("`")[1]: line for line in documentation.splitlines() if line.startswith("| `luffy_")}
    assert set(lines) == set(HUB_ROWS)
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    for name, benchmark in Catalog().benchmarks.items():
        config = manager.task_index[name].cfg
        assert f"| {benchmark.problems:,} | {benchmark.repeats} | `{config['dataset_path']}`" in lines[name]
        assert f"({config['test_split']})" in lines[name]
        assert all(f"`{source}`" in lines[name] for source in benchmark.data_sources)


def test_options_are_shuffled_the_same_everywhere():
    # as worked out once: another order would make two installations' scores differ
    text, right = shuffled_choices("Which?", ["a", "b", "c", "d"], 0)
    assert (text, right) == ("Which?\n\nA) c\nB) b\nC) a\nD) d\n", "C")
    letters = Counter(shuffled_choices(f"Which {i}?", ["a", "b", "c", "d"], 0)[1] for i in range(400))
    assert all(70 < letters[letter] < 130 for letter in "ABCD")


# Scores


@pytest.mark.parametrize(
    ("response", "thought", "verdict"),
    [
        ("<think>\\boxed{3}</think> It is \\boxed{2}.", "required", ("2", True)),
        ("It is \\boxed{2}.", "required", (None, False)),
        ("It is \\boxed{2}.", "optional", ("2", True)),
        ("\\boxed{2} </think> so", "unused", ("2", True)),
        ("so </think> <answer> 2 </answer>", "required", ("2", True)),
        ("so </think> <answer> \\boxed{2} </answer>", "required", ("2", True)),
        ("I do not know.", "optional", (None, False)),
    ],
)
def test_what_is_graded_of_a_response(response, thought, verdict):
    [judged] = judge_responses("math", [response], ["2"], thought)
    assert (judged.answer, judged.correct) == verdict


def test_a_choice_is_its_letter():
    verdicts = judge_responses("choice", ["B </think> \\boxed{C}", "I cannot say."], ["C", "C"], "optional")
    assert [(v.answer, v.correct) for v in verdicts] == [("C", True), (None, False)]


# Arithmetic


def sample(doc_id: int, repeat: int, score: float, **fields) -> Sample:
    return Sample("t", doc_id, repeat, "hash", "text", 10, False, score=score, **fields)


def test_avg_at_k_is_a_mean_over_problems_with_the_error_between_problems():
    # problem means 1, 1/2, 0, 0: mean 3/8, sample variance (25 + 1 + 9 + 9) / 64 / 3 = 11/48, error sqrt(11/48 / 4)
    scores = [[1, 1, 1, 1], [1, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
    samples = [sample(i, j, score) for i, row in enumerate(scores) for j, score in enumerate(row)]
    samples[0].answer, samples[1].truncated, samples[2].tokens = "2", True, 26
    assert summarize(samples) == Summary(
        score=3 / 8,
        stderr=pytest.approx((11 / 48 / 4) ** 0.5),
        problems=4,
        samples=4,
        truncated=1 / 16,
        unanswered=15 / 16,
        tokens=11,
    )
    assert summarize(samples[:4]).stderr is None  # one problem says nothing of others


def test_an_average_counts_benchmarks_the_same_and_needs_all_of_them():
    def summary(score: float, stderr: float) -> Summary:
        return Summary(score, stderr, 30, 32, 0.0, 0.0, 1.0)

    groups = {"g": ("a", "b"), "h": ("a", "c")}
    line = tables.row("m", {"a": summary(0.5, 0.03), "b": summary(0.1, 0.04)}, groups)
    assert line.scores == pytest.approx({"a": 50, "b": 10, "g": 30})
    assert line.stderrs == pytest.approx({"a": 3, "b": 4, "g": 2.5})  # sqrt(3² + 4²) / 2
    header, [cells] = tables.score_table("T", [line], ["a", "b"], "g", {"a": "A", "b": "B"})
    assert header == ["T", "A", "B", "Avg."]
    assert cells == ["m", "50.0 ± 3.0", "10.0 ± 4.0", "30.0 ± 2.5"]


def test_the_papers_rows_have_the_averages_that_are_printed_with_them():
    catalog = Catalog()
    rows = paper_rows()
    assert len(rows) == 8
    *whole, repaired = rows
    assert (repaired.name, repaired.scores) == ("SFT + RL, repaired (2604.23747)", {"luffy_math": 57.0})
    for line in whole:
        for group in catalog.groups.values():
            if group.name in line.scores:
                mean = sum(line.scores[name] for name in group.benchmarks) / len(group.benchmarks)
                assert line.scores[group.name] == pytest.approx(mean, abs=0.0501), line.name
    assert set().union(*(line.scores for line in rows)) == {*catalog.benchmarks, *catalog.groups}


# What is kept


def test_damaged_samples_are_named_and_half_written_ones_are_counted(tmp_path):
    settings = {"model": "m", "data": {"t": "1"}}
    store = SampleStore(tmp_path, settings)
    store.append([sample(0, 0, 1.0), sample(0, 1, 0.0)])
    store.close()
    path = tmp_path / "samples" / "t.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:30])
    store = SampleStore(tmp_path, settings | {"data": {"t": "1", "u": "2"}})
    assert (len(store.samples), store.half_written) == (2, 1)
    assert path.read_bytes() == whole
    store.close()
    path.write_bytes(b'{"task": 3\n' + whole)
    with pytest.raises(EvaluationError, match=r"t\.jsonl, line 1 is no sample"):
        SampleStore(tmp_path, settings)


KEPT = {"task": "t", "doc_id": 0, "repeat": 0, "prompt_hash": "h", "response": "r", "tokens": 3, "truncated": False}


def kept(**changes) -> bytes:
    return json.dumps({name: value for name, value in (KEPT | changes).items() if value is not ...}).encode()


# What stands in samples/t.jsonl, and what is said of it
DAMAGED_SAMPLES = {
    "cut within": (kept()[:40] + b"\n" + kept(repeat=1) + b"\n", "line 1 is no sample"),
    "wrong type of a number": (
        kept(doc_id="0"),
        "line 1 is no sample (`doc_id` is '0', expected a whole number, 0 or",
    ),
    "a number below 0": (kept(doc_id=-1), "`doc_id` is -1, expected a whole number, 0 or more"),
    "a fraction": (kept(repeat=0.5), "`repeat` is 0.5"),
    "true for a number": (kept(tokens=True), "`tokens` is True, expected a whole number"),
    "a list for a text": (kept(response=["a"]), "`response` is ['a'], expected a text"),
    "null for a text": (kept(response=None), "`response` is None, expected a text"),
    "a text for a truth": (kept(truncated="no"), "`truncated` is 'no', expected true or false"),
    "a text for a score": (kept(score="1"), "`score` is '1', expected a number"),
    "a missing key": (kept(response=...), "line 1 is no sample (it has no `response`)"),
    "another program's key": (kept(acc=1), "it has 'acc', which no sample has"),
    "another program's line": (b'{"doc": {"question": "?"}, "resps": [["a"]]}', "it has no `task`"),
    "another task": (kept(task="../../u"), "`task` is '../../u', in the file of 't'"),
    "a list": (b"[1, 2]", "it is [1, 2], expected an object"),
    "a number": (b"3", "it is 3, expected an object"),
    "null": (b"null", "it is None, expected an object"),
    "an empty line": (b"\n" + kept(), "line 1 is no sample"),
    "NUL bytes": (b"\0" * 40 + b"\n" + kept(), "line 1 is no sample"),
    "a NUL byte in a text": (
        kept().replace(b'"r"', b'"r\0"') + b"\n",
        "line 1 is no sample (Invalid control character",
    ),
    "no UTF-8": (kept().replace(b'"r"', b'"\xff\xfe"') + b"\n", "line 1 is no sample ('utf-8' codec can't decode"),
    "UTF-16": (kept().decode().encode("utf-16"), "line 1 is no sample"),
    "a picture without a line's end": (b"\x89PNG\r" + bytes(range(11, 256)) * 9, "line 1 is no sample"),
    "a number without an end": (kept().replace(b": 3", b": " + b"3" * 5000) + b"\n", "line 1 is no sample"),
    "nested without an end": (b"[" * 100_000 + b"\n", "line 1 is no sample"),
    "a long text for a number": (kept(doc_id="x" * 10_000), "expected a whole number, 0 or more"),
    "the second line": (kept() + b"\n" + kept(repeat="1") + b"\n", "line 2 is no sample (`repeat` is '1'"),
}


@pytest.mark.parametrize(("content", "message"), DAMAGED_SAMPLES.values(), ids=DAMAGED_SAMPLES)
def test_a_line_that_is_no_sample_is_named_and_left_as_it_is(content, message, tmp_path):
    settings = {"model": "m", "data": {"t": "1"}}
    SampleStore(tmp_path, settings).close()
    run_file, path = tmp_path / "run.json", tmp_path / "samples" / "t.jsonl"
    content = content if content.endswith(b"\n") or b"PNG" in content else content + b"\n"
    path.write_bytes(content)
    before = run_file.read_bytes()
    for _ in range(2):  # the first leaves no lock behind
        with pytest.raises(EvaluationError) as raised:
            SampleStore(tmp_path, settings)
        assert f"{path}, line " in str(raised.value)
        assert message in str(raised.value)
        assert str(raised.value).count("\n") == 0
        assert len(str(raised.value)) < 700
    assert (path.read_bytes(), run_file.read_bytes()) == (content, before)


def test_a_line_without_an_end_is_read_no_further_than_a_sample_can_be_long(tmp_path):
    store = SampleStore(tmp_path, {"data": {}})
    store.close()
    with open(tmp_path / "samples" / "t.jsonl", "wb") as file:
        file.truncate(1 << 33)  # of 8 GiB, which take no space
    with pytest.raises(EvaluationError, match=r"t\.jsonl, line 1 is no sample \(it has 67108864 bytes and more\)"):
        SampleStore(tmp_path, {"data": {}})
    assert (tmp_path / "samples" / "t.jsonl").stat().st_size == 1 << 33


@pytest.mark.parametrize(
    "tail", [b"", kept(repeat=1)[:-1], kept(repeat=1)[:5], b"\0" * 512, kept()[:30] + b"\0" * 512]
)
def test_what_a_kill_or_a_loss_of_power_leaves_at_the_end_is_made_again(tail, tmp_path):
    settings = {"data": {"t": "1"}}
    SampleStore(tmp_path, settings).close()
    path = tmp_path / "samples" / "t.jsonl"
    path.write_bytes(kept() + b"\n" + tail)
    store = SampleStore(tmp_path, settings)
    assert (len(store.samples), store.half_written) == (1, int(tail != b""))
    assert path.read_bytes() == kept() + b"\n"
    store.close()


def test_a_last_sample_without_a_line_break_is_kept(tmp_path):
    """As an editor leaves it."""
    settings = {"data": {"t": "1"}}
    SampleStore(tmp_path, settings).close()
    path = tmp_path / "samples" / "t.jsonl"
    path.write_bytes(kept())
    store = SampleStore(tmp_path, settings)
    assert (len(store.samples), store.half_written) == (1, 0)
    store.append([Sample(**(KEPT | {"repeat": 1, "response": "\0 \ud800 \u2028"}))])
    store.close()
    store = SampleStore(tmp_path, settings)
    assert store.samples["t", 0, 1].response == "\0 \ud800 \u2028"
    store.close()


RUN = {"model": "m", "data": {"t": "1"}}
DAMAGED_MANIFESTS = {
    "cut": json.dumps(RUN).encode()[:-3], "empty": b"", "NUL bytes": b"\0" * 99, "no UTF-8": b'{"model": "\xff"}',
    "UTF-16": json.dumps(RUN).encode("utf-16"), "a list": b"[]", "null": b"null", "a number": b"1",
    "no data": b'{"model": "m"}', "data of another type": json.dumps(RUN | {"data": ["t"]}).encode(),
    "another program's": b'{"command": "python run.py", "exit": 0}', "nested without an end": b"[" * 100_000,
    "a directory": None,
}  # fmt: skip


@pytest.mark.parametrize("content", DAMAGED_MANIFESTS.values(), ids=DAMAGED_MANIFESTS)
@pytest.mark.parametrize("samples", [True, False])
def test_a_damaged_run_file_is_named_and_left_as_it_is(content, samples, tmp_path):
    path = tmp_path / "run.json"
    (tmp_path / "samples").mkdir()
    if samples:
        (tmp_path / "samples" / "t.jsonl").write_bytes(kept() + b"\n" + kept()[:20])
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    with pytest.raises(EvaluationError) as raised:
        SampleStore(tmp_path, RUN)
    assert f"--output_dir {tmp_path}" in str(raised.value)
    assert "run.json" in str(raised.value)
    assert "Choose another --output_dir." in str(raised.value)
    assert path.is_dir() if content is None else path.read_bytes() == content
    if samples:  # not even what a kill left
        assert (tmp_path / "samples" / "t.jsonl").read_bytes() == kept() + b"\n" + kept()[:20]


def test_a_run_file_with_other_values_is_told_in_one_line(tmp_path):
    SampleStore(tmp_path, RUN).close()
    (tmp_path / "samples" / "t.jsonl").write_bytes(kept() + b"\n")
    for value in ("x" * 100_000, ["a"], {"b": "c\nd"}, None, 3):
        (tmp_path / "run.json").write_text(json.dumps(RUN | {"model": value}))
        with pytest.raises(EvaluationError, match="holds samples made with model ") as raised:
            SampleStore(tmp_path, RUN)
        assert len(str(raised.value)) < 600
        assert "\n" not in str(raised.value)
    (tmp_path / "run.json").write_text(json.dumps(RUN | {"data": {"t": ["1"]}}))
    with pytest.raises(EvaluationError, match="other problems for t"):
        SampleStore(tmp_path, RUN)


@pytest.mark.parametrize(
    ("place", "kind", "message"),
    [
        ("samples/luffy_math500.jsonl", "directory", "luffy_math500.jsonl is no file of samples. Move it out"),
        ("samples/luffy_math500.jsonl", "pipe", "luffy_math500.jsonl is no file of samples. Move it out"),
        ("samples/notes.jsonl", "text", "notes.jsonl, line 1 is no sample"),
        ("samples", "text", "cannot be read or written"),
        ("run.json", "directory", "run.json that is damaged, or not of luffy-trl eval"),
        ("run.json", "pipe", "run.json that is damaged, or not of luffy-trl eval"),
        ("run.json", "text", "run.json that is damaged, or not of luffy-trl eval"),
        (".lock", "directory", "cannot be read or written"),
        ("results.json", "directory", "results.json is a directory there"),
        ("results.md", "directory", "results.md is a directory there"),
        (".", "text", "cannot be read or written"),
    ],
)
def test_what_lies_in_place_of_a_file_ends_with_one_line(place, kind, message, model_dir, data_file, tmp_path, capsys):
    path = tmp_path / "out" / place
    path.parent.mkdir(parents=True, exist_ok=True)
    {"directory": Path.mkdir, "pipe": os.mkfifo, "text": lambda path: path.write_text("mine\n")}[kind](path)
    error = error_of(options(model_dir, data_file, tmp_path / "out"), capsys)
    assert message in error
    if kind == "text":
        assert path.read_text() == "mine\n"


def test_a_damaged_run_ends_with_one_line(model_dir, data_file, tmp_path, capsys):
    command = options(model_dir, data_file, tmp_path / "out", limit=1, n_samples=1, tasks="luffy_math500")
    main(command)
    run_file, samples = tmp_path / "out" / "run.json", tmp_path / "out" / "samples" / "luffy_math500.jsonl"
    whole = samples.read_text()
    samples.write_text(whole.replace('"repeat": 0', '"repeat": "0"'))
    assert "luffy_math500.jsonl, line 1 is no sample (`repeat` is '0'" in error_of(command, capsys)
    samples.write_text(whole)
    run_file.write_text(run_file.read_text()[:-20])
    assert "run.json, which says how they were made, cannot be read" in error_of(command, capsys)


@pytest.mark.parametrize(
    ("flags", "difference"),
    [
        ({"temperature": 0.7}, "temperature 0.6 instead of 0.7"),
        ({"seed": 1}, "seed 0 instead of 1"),
        ({"template": "plain"}, "template 'own' instead of 'plain'"),
        ({"max_new_tokens": 40}, "max_new_tokens 48 instead of 40"),
        ({"data": "other problems"}, "other problems for luffy_math500"),
        ({"model": "other weights"}, "model_files"),
    ],
)
def test_samples_of_other_settings_are_never_mixed_in(flags, difference, model_dir, data_file, tmp_path, capsys):
    output = tmp_path / "out"
    model_dir = shutil.copytree(model_dir, tmp_path / "model")
    common = {"n_samples": 1, "limit": 1, "tasks": "luffy_math500"}
    main(options(model_dir, data_file, output, **common))
    before = (output / "run.json").read_text()
    if flags.pop("data", None):
        data_file.write_text(data_file.read_text().replace("math 1?", "math 9?"))
    if flags.pop("model", None):
        (model_dir / "chat_template.jinja").write_text((model_dir / "chat_template.jinja").read_text() + "{# new #}")
    message = error_of(options(model_dir, data_file, output, **common | flags), capsys)
    assert f"holds samples made with {difference}" in message
    assert (output / "run.json").read_text() == before


# What a user can get wrong


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"model": "no/model"}, "--model no/model is neither a local directory nor found on the Hub"),
        ({"tasks": "luffy_maths"}, "--tasks luffy_maths: there is no such task or group. There are luffy_math, "),
        (
            {"tasks": "luffy_arc_c"},
            "--data_files has no problems for luffy_arc_c (data_source arc_c), only for aime, math",
        ),
        ({"data_files": "no.parquet"}, "--data_files no.parquet: there is no such file"),
        ({"data_files": __file__}, "expected a file that ends in .parquet, .json, .jsonl"),
        ({"max_new_tokens": 8192}, "--max_new_tokens 8192 does not fit: the longest prompt"),
        ({"limit": 0}, "--limit 0 must be 1 or more"),
        ({"temperature": -1}, "--temperature -1.0 must be 0 or more"),
        ({"batch_size": "many"}, "--batch_size many must be 1 or more, or auto"),
        ({"compare": "nowhere"}, "--compare nowhere: there is no results.json in it"),
        ({"model_args": "peft"}, "--model_args peft: expected KEY=VALUE"),
        ({"model_args": "pretrained=x"}, "--model_args pretrained: use --model"),
        ({"model_args": "no_such_argument=1"}, "could not be loaded by lm-eval's hf"),
        ({"adapter": "nowhere"}, "--adapter nowhere: there is no adapter_config.json in it"),
        ({"tensor_parallel_size": 2}, "--tensor_parallel_size needs --backend vllm"),
        ({"backend": "vllm"}, "--backend vllm needs vLLM"),
        ({"template": "plain", "system_prompt": "Go."}, "--system_prompt cannot be combined with --template plain"),
        ({"temprature": 1}, "unrecognized arguments: --temprature 1"),
    ],
)
def test_wrong_arguments_end_with_one_line(flags, message, model_dir, data_file, tmp_path, capsys):
    assert message in error_of(options(model_dir, data_file, tmp_path / "out", **flags), capsys)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": None}, "row 5: `prompt` is NoneType, expected a list of messages"),
        ({"prompt": [{"role": "assistant", "content": "2"}]}, "row 5: `prompt` has the roles ['assistant']"),
        ({"prompt": [{"role": "user", "content": ["?"]}]}, "row 5: `prompt` is list"),
        ({"prompt": ["?"]}, "row 5: `prompt` is list"),
        ({"reward_model": {"ground_truth": None}}, "row 5: `reward_model.ground_truth` is None"),
        ({"reward_model": "math"}, "row 5: `reward_model` is str, expected an object"),
    ],
)
def test_bad_rows_are_named(row, message, model_dir, data_file, tmp_path, capsys):
    good = {"data_source": "aime", "prompt": [{"role": "user", "content": "?"}], "reward_model": {"ground_truth": "1"}}
    data_file.write_text(data_file.read_text() + json.dumps(good | row) + "\n")
    assert message in error_of(options(model_dir, data_file, tmp_path / "out"), capsys)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("broken.parquet", "PAR1 not yet", "broken.parquet cannot be read: "),
        ("broken.jsonl", '{"data_source": ', "broken.jsonl cannot be read: "),
        ("empty.json", "", "empty.json cannot be read: "),
    ],
)
def test_a_file_that_cannot_be_read_is_named(name, content, message, model_dir, tmp_path, capsys):
    (tmp_path / name).write_text(content)
    assert message in error_of(options(model_dir, tmp_path / name, tmp_path / "out"), capsys)


@pytest.mark.parametrize(
    "results",
    [
        '{"results": {"math": {"acc": 1}}}', '{"name": "a", "tasks": ', "[]", '{"name": "", "tasks": {"b": {}}}',
        "[" * 100_000, '{"name": 3, "tasks": {}}',
        json.dumps({"name": "a", "tasks": {"luffy_aime24": {
            "score": "0.5", "stderr": None, "problems": 1, "samples": 1, "truncated": 0, "unanswered": 0, "tokens": 1,
        }}}),
    ],
)  # fmt: skip
def test_another_programs_results_are_not_compared_with(results, model_dir, data_file, tmp_path, capsys):
    (tmp_path / "results.json").write_text(results)
    message = error_of(options(model_dir, data_file, tmp_path / "out", compare=tmp_path), capsys)
    assert f"--compare {tmp_path}: its results.json is not, or no longer, as luffy-trl eval writes it" in message


def test_without_the_hub_or_a_chat_template_it_says_what_to_do(model_dir, data_file, tmp_path, capsys):
    command = ["--model", str(model_dir), "--output_dir", str(tmp_path / "out")]
    message = error_of([*command, "--tasks", "luffy_ood"], capsys)
    assert "luffy_arc_c: allenai/ai2_arc could not be loaded from the Hub" in message
    assert "--data_files reads problems from local files" in message
    bare = tmp_path / "bare"
    AutoModelForCausalLM.from_pretrained(model_dir).save_pretrained(bare)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(bare)
    assert "has no chat template: choose --template plain" in error_of(
        options(bare, data_file, tmp_path / "o"), capsys
    )


@pytest.mark.parametrize("content", ["{", "[]", "", "\0", "[" * 100_000])
def test_a_damaged_adapter_is_named(content, model_dir, data_file, tmp_path, capsys):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(content)
    message = f"{tmp_path / 'adapter'}: its adapter_config.json "
    arguments = options(model_dir, data_file, tmp_path / "out")
    assert f"--adapter {message}" in error_of([*arguments, "--adapter", str(tmp_path / "adapter")], capsys)
    assert f"--model {message}" in error_of(options(tmp_path / "adapter", data_file, tmp_path / "out"), capsys)


def test_without_lm_eval_it_says_how_to_install_it(monkeypatch, model_dir, data_file, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert "pip install 'luffy_trl[eval]'" in error_of(options(model_dir, data_file, tmp_path / "out"), capsys)


def test_repeated_rows_are_one_problem(model_dir, data_file, tmp_path, capsys):
    data_file.write_text(data_file.read_text() * 2)
    main(options(model_dir, data_file, tmp_path / "out", n_samples=1))
    printed = capsys.readouterr().out
    assert "3 repeated rows of aime were left out" in printed
    assert "AIME 24 has 3 problems here; the paper's has 30" in printed
    assert len(kept_samples(tmp_path / "out")) == 5
    assert os.path.exists(tmp_path / "out" / "results.md")
