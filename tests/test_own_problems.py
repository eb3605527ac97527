"""`luffy-trl eval --dataset_name`: a user's own problems, as the trainer reads, renders and grades them."""

import json
import shutil
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from luffy_trl import LuffyTrainer
from luffy_trl.commands import cli
from luffy_trl.commands.eval import main
from luffy_trl.evaluation.backends import HuggingFaceBackend
from luffy_trl.rewards import math_reward_optional_thought

from .conftest import SAID, SMALL_RUN


ROWS = [
    {"prompt": [{"role": "user", "content": f"What is {i}?"}], "solution": gold, "level": level}
    for i, (gold, level) in enumerate([("2", 1), ("3", 1), ("2", None), ("5", 2)])
]


def write(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def data(tmp_path) -> Path:
    return write(tmp_path / "data" / "mine.jsonl", ROWS)


def options(model, data, output, *rewards: str, **flags) -> list[str]:
    flags = {"max_new_tokens": 48, "batch_size": 16} | flags
    return [
        "--model", str(model), "--dataset_name", str(data), "--output_dir", str(output),
        "--reward_funcs", *(rewards or ["math_reward_optional_thought"]),
        *(part for name, value in flags.items() for part in (f"--{name}", str(value))),
    ]  # fmt: skip


def samples_in(output: Path, name: str = "mine") -> list[dict]:
    return [json.loads(line) for line in (output / "samples" / f"{name}.jsonl").read_text().splitlines()]


def summary(output: Path, name: str = "mine") -> dict:
    return json.loads((output / "results.json").read_text())["tasks"][name]


def error_of(arguments: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def level_reward(completions, level, **kwargs):
    """Does not apply to problems without a level."""
    return [None if of is None else of / 2 for of in level]


def raising_reward(completions, level, **kwargs):
    return [1 / of for of in level]


async def async_reward(completions, **kwargs):
    return [0.25] * len(completions)


def short_reward(completion_ids, prompts, completions, **kwargs):
    assert all(prompt[-1]["role"] == "user" for prompt in prompts)
    assert all(completion[0]["role"] == "assistant" for completion in completions)
    return [float(len(ids)) for ids in completion_ids]


def test_the_share_solved_and_each_rewards_mean_equal_a_recount_of_the_kept_samples(
    speaking_model, data, tmp_path, capsys
):
    output, here = tmp_path / "out", "tests.test_own_problems"
    own = [f"{here}.{name}" for name in ("level_reward", "short_reward", "async_reward")]
    rewards = ["math_reward_optional_thought", *own]
    main(options(speaking_model, data, output, *rewards, n_samples=6, temperature=1.2))
    samples = samples_in(output)
    assert len(samples) == 4 * 6

    solved: dict[int, list[float]] = defaultdict(list)
    for s in samples:
        right = s["gold"] == "2" and "\\boxed{2}" in s["response"].split("</think>")[-1]
        solved[s["doc_id"]].append(float(right))
        assert s["rewards"]["math_reward_optional_thought"] == s["score"] == float(right)
        assert s["prompt"] == f"<|im_start|>user\nWhat is {s['doc_id']}?<|im_end|>\n<|im_start|>assistant\n<think>\n"
        assert s["rewards"]["level_reward"] == {0: 0.5, 1: 0.5, 2: None, 3: 1.0}[s["doc_id"]]
        if s["response"] == SAID:  # what was sampled, its end included
            assert s["rewards"]["short_reward"] == s["tokens"]
    means = [sum(of) / 6 for of in solved.values()]
    mean = sum(means) / 4
    assert 0 < mean < 0.5
    found = summary(output)
    assert found["score"] == pytest.approx(mean)
    assert found["stderr"] == pytest.approx((sum((m - mean) ** 2 for m in means) / 3 / 4) ** 0.5)
    assert (found["problems"], found["samples"]) == (4, 6)
    assert found["rewards"]["async_reward"] == {"mean": 0.25, "stderr": 0.0, "not_applicable": 0}
    assert found["rewards"]["level_reward"]["mean"] == pytest.approx((0.5 + 0.5 + 1) / 3)
    assert found["rewards"]["level_reward"]["not_applicable"] == 6
    printed = capsys.readouterr().out
    assert "level_reward gave nothing (None) for 6 responses of mine" in printed
    assert f"{100 * mean:.1f} ±" in printed
    assert "| solved | math_reward_optional_thought | level_reward |" in (output / "results.md").read_text()


def test_it_is_graded_anew_without_a_model_and_grows(speaking_model, data, tmp_path, capsys):
    output = tmp_path / "out"
    main(options(speaking_model, data, output, limit=2))
    planted = [s | {"response": "It is \\boxed{3}."} for s in samples_in(output)]
    write(output / "samples" / "mine.jsonl", planted)
    main(options(speaking_model, data, output, limit=2))
    assert [s["score"] for s in samples_in(output)] == [0.0, 1.0]
    assert "2 of 2 samples are kept" in capsys.readouterr().out
    main(options(speaking_model, data, output, n_samples=2))
    grown = {(s["doc_id"], s["repeat"]): s["response"] for s in samples_in(output)}
    assert len(grown) == 8
    assert all(grown[i, 0] == "It is \\boxed{3}." for i in (0, 1))


def test_two_models_stand_side_by_side(speaking_model, data, tmp_path, capsys):
    other = shutil.copytree(speaking_model, tmp_path / "other_model")
    main(options(other, data, tmp_path / "a", temperature=0))
    main(
        [
            *options(speaking_model, data, tmp_path / "b", temperature=0, name="second"),
            "--compare",
            str(tmp_path / "a"),
        ]
    )
    lines = capsys.readouterr().out.splitlines()[-12:]
    assert any(line.startswith(f"other_model ({tmp_path / 'a'})   50.0 ±") for line in lines)
    assert any(line.startswith("second ") and " 50.0 ±" in line for line in lines)

    write(data, [*ROWS[:3], ROWS[3] | {"solution": "6"}])
    message = error_of([*options(speaking_model, data, tmp_path / "c"), "--compare", str(tmp_path / "a")], capsys)
    assert f"--compare {tmp_path / 'a'}: its mine holds other problems or gold answers than --dataset_name" in message
    renamed = write(tmp_path / "yours.jsonl", ROWS)
    message = error_of([*options(speaking_model, renamed, tmp_path / "c"), "--compare", str(tmp_path / "a")], capsys)
    assert "it has no results on yours, only on mine" in message
    message = error_of([*options(speaking_model, data, tmp_path / "c"), "--compare", "paper"], capsys)
    assert "the paper has no results on your own problems" in message


TURNS = [
    {"role": "system", "content": "Be short."}, {"role": "user", "content": "Hello."},
    {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "What is 1 + 1?"},
]  # fmt: skip


TOOLS = {"tools": json.dumps([{"type": "function", "function": {"name": "add", "parameters": {}}}])}


@pytest.mark.parametrize(
    ("prompt", "others"),
    [(TURNS, {}), (TURNS[1:2], {}), (TURNS[1:2], TOOLS), ("What is 1 + 1? Answer:", {})],
    ids=["turns", "one turn", "with tools", "text"],
)
@pytest.mark.parametrize("with_bos", [False, True])
def test_the_model_is_given_the_tokens_that_the_trainer_gives_it(
    prompt, others, with_bos, speaking_model, tmp_path, monkeypatch, config
):
    model = shutil.copytree(speaking_model, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    if with_bos:  # a tokenizer that begins every text with one, unlike its chat template
        tokenizer.add_special_tokens({"bos_token": "<|im_start|>"})
        bos = ("<|im_start|>", tokenizer.bos_token_id)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
        tokenizer.chat_template = "Q: " + tokenizer.chat_template
    tokenizer.chat_template = tokenizer.chat_template + "{{ tools | tojson if tools }}"
    tokenizer.save_pretrained(model)
    contexts = []
    generate = HuggingFaceBackend._model_generate

    def recorded(self, context, **kwargs):
        contexts.append(context.tolist())
        return generate(self, context, **kwargs)

    monkeypatch.setattr(HuggingFaceBackend, "_model_generate", recorded)
    rows = [{"prompt": prompt, "solution": "2", **others}]
    main(options(model, write(tmp_path / "mine.jsonl", rows), tmp_path / "out"))
    trainer = LuffyTrainer(
        str(model), math_reward_optional_thought, config(num_demonstrations=0),
        train_dataset=Dataset.from_list(rows * 8), processing_class=AutoTokenizer.from_pretrained(model),
    )  # fmt: skip
    trainer._rows_under_way = rows
    trainers_ids, *_ = trainer._tokenize_prompts([prompt])
    assert contexts == [trainers_ids]
    assert (trainers_ids[0][0] == tokenizer("<|im_start|>", add_special_tokens=False)["input_ids"][0]) == (
        with_bos == isinstance(prompt, str)
    )
    assert ("add" in tokenizer.decode(trainers_ids[0])) == bool(others)


def test_templates_and_the_system_prompt(speaking_model, data, tmp_path, capsys):
    def prompt_of(name: str, **flags) -> str:
        main(options(speaking_model, data, tmp_path / name, temperature=0, limit=1, **flags))
        return samples_in(tmp_path / name)[0]["prompt"]

    assert prompt_of("plain", template="plain") == "What is 0?"
    assert prompt_of("system", system_prompt="Go.").startswith("<|im_start|>system\nGo.<|im_end|>\n<|im_start|>user\n")
    write(data, [{"prompt": TURNS, "solution": "2"}])
    message = error_of(options(speaking_model, data, tmp_path / "x", template="plain"), capsys)
    assert "row 0: --template plain takes one problem, and the prompt has the roles user, assistant, user" in message
    write(data, [{"prompt": "1 + 1 =", "solution": "2"}])
    message = error_of(options(speaking_model, data, tmp_path / "x", system_prompt="Go."), capsys)
    assert "--system_prompt needs messages, and the prompts of" in message
    main(options(speaking_model, data, tmp_path / "text", temperature=0))
    assert "its chat template is not used" in capsys.readouterr().out


def test_prompts_are_rendered_with_and_without_thinking(speaking_model, data, tmp_path):
    model = shutil.copytree(speaking_model, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template += "{{ 'deep' if enable_thinking else 'short' }}"
    tokenizer.save_pretrained(model)
    for says, end in (("True", "deep"), ("False", "short")):
        flags = {"model_args": f"enable_thinking={says}", "temperature": 0, "limit": 1}
        main(options(model, data, tmp_path / end, **flags))
        assert samples_in(tmp_path / end)[0]["prompt"].endswith(f"<think>\n{end}")


def test_the_test_split_of_a_directory_and_the_embedded_task(speaking_model, tiny_model_dir, tmp_path, capsys):
    write(tmp_path / "both" / "train.jsonl", ROWS)
    write(tmp_path / "both" / "test.jsonl", ROWS[:1])
    main(options(speaking_model, tmp_path / "both", tmp_path / "a", temperature=0))
    assert summary(tmp_path / "a", "both")["problems"] == 1
    main(options(speaking_model, tmp_path / "both", tmp_path / "b", temperature=0, dataset_split="train"))
    assert summary(tmp_path / "b", "both")["problems"] == 4
    (tmp_path / "both" / "test.jsonl").rename(tmp_path / "both" / "validation.jsonl")
    message = error_of(options(speaking_model, tmp_path / "both", tmp_path / "c"), capsys)
    assert "has the splits 'train', 'validation', and none is 'test': name one with --dataset_split" in message
    main(options(tiny_model_dir, "letter_walk", tmp_path / "d", "letter_walk_reward", limit=3, max_new_tokens=8))
    assert summary(tmp_path / "d", "letter_walk")["problems"] == 3
    assert summary(tmp_path / "d", "letter_walk")["unanswered"] is None


def test_what_a_reward_function_raises_is_told_with_its_row_and_all_samples_stay(
    speaking_model, data, tmp_path, capsys
):
    arguments = options(speaking_model, data, tmp_path / "out", "tests.test_own_problems.raising_reward")
    message = error_of(arguments, capsys)
    assert "mine.jsonl, row 2: --reward_funcs raising_reward: TypeError: unsupported operand" in message
    assert "All samples are kept" in message
    write(data, [row | {"level": 0 if row["level"] is None else 1} for row in ROWS])
    main(options(speaking_model, data, tmp_path / "out", "tests.test_own_problems.level_reward"))
    assert "4 of 4 samples are kept" in capsys.readouterr().out


def test_gold_answers_that_cannot_be_read_are_counted_apart(speaking_model, data, tmp_path, capsys):
    write(data, [ROWS[0], ROWS[1] | {"solution": ""}])
    main(options(speaking_model, data, tmp_path / "out", temperature=0))
    assert (summary(tmp_path / "out")["score"], summary(tmp_path / "out")["ungraded"]) == (1.0, 1)
    assert "1 responses of mine are neither solved nor not" in capsys.readouterr().out
    write(data, [ROWS[1] | {"solution": ""}])
    message = error_of(options(speaking_model, data, tmp_path / "none", temperature=0), capsys)
    assert "none of the 1 responses has a score" in message


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dataset_name", "{data}"], "--reward_funcs is missing. Give one or more of math_reward"),
        (["--dataset_name", "{data}", "--reward_funcs", "no_reward"], "--reward_funcs no_reward: no such reward"),
        (["--dataset_name", "no.jsonl", "--reward_funcs", "math_reward"], "no.jsonl: there is no such file"),
        (
            ["--dataset_name", "{prompts}", "--reward_funcs", "math_reward"],
            "--reward_funcs math_reward needs the column 'solution'",
        ),
        (
            ["--dataset_name", "{data}", "--reward_funcs", "math_reward", "--tasks", "luffy_amc"],
            "--tasks is about the",
        ),
        (["--reward_funcs", "math_reward"], "--reward_funcs needs --dataset_name, the problems of your own"),
        (
            ["--dataset_name", "{data}", "--reward_funcs", "math_reward", "--solved_reward", "x"],
            "solved_reward='x' is not the name of a reward function",
        ),
        (
            ["--dataset_name", "{data}", "--reward_funcs", "math_reward", "--reward_weights", "1", "2"],
            "--reward_weights has 2 weights for 1 reward functions",
        ),
        (["--dataset_name", "{images}", "--reward_funcs", "math_reward"], "The column 'image' of --dataset_name"),
        (
            ["--dataset_name", "{data}", "--reward_funcs", "math_reward", "--system_prompt", "data"],
            "the system messages of --dataset_name are always used",
        ),
        (["--dataset_name", "{roles}", "--reward_funcs", "math_reward"], "row 0: `prompt[0]` is dict"),
    ],
)
def test_what_a_user_can_get_wrong_is_told_in_one_sentence(flags, message, speaking_model, data, tmp_path, capsys):
    files = {
        "data": data,
        "prompts": write(tmp_path / "prompts.jsonl", [{"prompt": "?"}]),
        "images": write(tmp_path / "images.jsonl", [ROWS[0] | {"image": "x.png"}]),
        "roles": write(tmp_path / "roles.jsonl", [{"prompt": [{"content": "?"}], "solution": "2"}]),
    }
    command = ["--model", str(speaking_model), "--output_dir", str(tmp_path / "out")]
    assert message in error_of([*command, *(flag.format(**files) for flag in flags)], capsys)


def test_a_weighted_total_decides_where_it_is_asked_to(speaking_model, data, tmp_path):
    rewards = ("math_reward_optional_thought", "format_reward")
    arguments = options(speaking_model, data, tmp_path / "out", *rewards, temperature=0, solved_reward="total")
    main([*arguments, "--solved_threshold", "0.75", "--reward_weights", "0.25", "0.5"])
    # what the model says begins inside a thought, and is well formed: 0.25 + 0.5 where it is right, else 0.5
    assert [s["score"] for s in samples_in(tmp_path / "out")] == [1.0, 0.0, 1.0, 0.0]
    assert torch.tensor(summary(tmp_path / "out")["score"]) == 0.5


@pytest.mark.slow
def test_from_a_table_of_questions_to_a_trained_and_evaluated_model(speaking_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lines = [f"What is {i} less than {i + 2}?,2" for i in range(24)]
    Path("mine.csv").write_text("\n".join(["question,answer", *lines]))
    rewards = ["--reward_funcs", "math_reward_optional_thought"]
    prepare = ["prepare-data", "mine.csv", "--output_dir", "data/mine", "--tokenizer", str(speaking_model)]
    cli.main([*prepare, "--keep_without_demonstration", "--test_size", "6"])
    train = ["train", "--model_name_or_path", str(speaking_model), "--dataset_name", "data/mine", *rewards]
    train += ["--num_demonstrations", "0", "--eval_strategy", "steps", "--eval_steps", "1", "--output_dir", "out/mine"]
    small = SMALL_RUN | {"max_steps": 1, "per_device_eval_batch_size": 8, "max_completion_length": 48}
    cli.main([*train, *(str(part) for name, value in small.items() for part in (f"--{name}", value))])
    assert "eval_reward" in capsys.readouterr().out
    evaluate = ["eval", "--model", "out/mine", "--dataset_name", "data/mine", *rewards, "--output_dir", "evals/mine"]
    cli.main([*evaluate, "--max_new_tokens", "48"])
    found = summary(Path("evals/mine"))
    assert found["problems"] == 6
    assert found["score"] > 0.5
    assert found["unanswered"] < 0.5
