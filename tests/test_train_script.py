"""`train.py` and `luffy-trl` as a user starts them."""

import json
import subprocess
import sys
from pathlib import Path

import accelerate.commands.config.config_args as accelerate_config
import pandas as pd
import pytest
import yaml
from datasets import Dataset
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from luffy_trl.commands.cli import main, train
from luffy_trl.commands.sft import to_prompt_completion
from luffy_trl.tasks.letter_walk import split_walks, to_dataset
from luffy_trl.tasks.letter_walk_base import accuracy

from .conftest import HUNG


ROOT = Path(__file__).parents[1]
ACCELERATE_CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
CPU = ["--use_cpu", "--bf16", "False"]


def run(*command, cwd=ROOT) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, timeout=HUNG, cwd=cwd, check=False
    )


# Files that come with the repository


def test_there_are_configs():
    assert len(ACCELERATE_CONFIGS) >= 9


@pytest.mark.parametrize("path", ACCELERATE_CONFIGS, ids=lambda path: path.stem)
def test_accelerate_loads_its_configs(path):
    config = accelerate_config.load_config_from_file(str(path))
    assert config.num_processes >= 1
    assert set(yaml.safe_load(path.read_text())) <= set(vars(config))


# Wrong flags


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config"], "--config needs a file"),
        (["--config", "nowhere.yaml"], "No such file or directory: 'nowhere.yaml'"),
        (["--num_demonstrations", "8", *CPU], "num_demonstrations=8 must be below num_generations=8"),
        (["--max_steps", "many"], "invalid int value: 'many'"),
        (["--no_such_field", "1"], "unknown arguments: --no_such_field 1"),
        # no abbreviation is taken for what it may mean
        (
            ["--num_demonstration", "1"],
            "--num_demonstration 1 (did you mean --num_demonstrations?)",
        ),
        (["recipes/letter_walk.yaml"], "unknown arguments: recipes/letter_walk.yaml"),
        (["--num_demonstrations", "1"], "Without a GPU, add --use_cpu --bf16 False"),
        (["--dataset_name", "some/data", *CPU], "--model_name_or_path is missing: which model"),
        (["--model_name_or_path", "some/model", *CPU], "--dataset_name is missing: what should some/model"),
        (["--model_name_or_path", "m", "--dataset_name", "no.jsonl", *CPU], "no.jsonl: there is no such file"),
        (["--model_name_or_path", "m", "--dataset_name", "d", *CPU], "--reward_funcs is missing"),
        (["--reward_funcs", "no_such_reward", *CPU], "no such reward function. Known are math_reward"),
        (["--reward_funcs", "no_such_module.reward", *CPU], "No module named 'no_such_module'"),
        (["--reward_funcs", "json.reward", *CPU], "json has no function reward"),
    ],
)
def test_wrong_arguments_end_with_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        train(arguments)
    assert exit_.value.code == 2
    *_, usage, last = capsys.readouterr().err.strip().splitlines()
    assert usage == "usage: train.py [--config RECIPE.yaml] [--FIELD VALUE ...]"
    assert last.startswith("train.py: error: ")
    assert message in last


def test_unknown_keys_of_a_recipe_are_refused(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("use_cpu: true\nbf16: false\nshaping_gama: 0.2\n")
    with pytest.raises(SystemExit):
        train([f"--config={recipe}"])
    assert "shaping_gama" in capsys.readouterr().err


def test_the_command_lists_what_it_can_do(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    assert {"train", "demo"} <= set(capsys.readouterr().out.split())
    with pytest.raises(SystemExit) as exit_:
        main([])
    assert exit_.value.code == 2


# Real runs


@pytest.mark.slow
def test_a_recipe_runs_through_accelerate_launch(tmp_path, tiny_model_dir):
    run_ = run(
        "-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/cpu.yaml", "train.py",
        "--config", "recipes/letter_walk.yaml", "--model_name_or_path", tiny_model_dir,
        "--output_dir", tmp_path / "out", "--max_steps", 2, "--logging_steps", 1,
    )  # fmt: skip
    assert run_.returncode == 0, run_.stderr[-3000:]
    assert "'off_policy/reward': '1'" in run_.stdout
    assert "Saved the model, its tokenizer and its card" in run_.stdout
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_text().count("# out") == 1

    report = run("-m", "luffy_trl", "report", tmp_path / "out", "--output_dir", tmp_path / "report")
    assert report.returncode == 0, report.stderr
    assert "128 completions" in report.stdout  # two logs of 64


@pytest.mark.slow
def test_two_cpu_processes(tmp_path, tiny_model_dir):
    run_ = run(
        "-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/cpu.yaml", "--num_processes", 2,
        "--main_process_port", 0, "train.py", "--config", "recipes/letter_walk.yaml",
        "--model_name_or_path", tiny_model_dir, "--output_dir", tmp_path / "out", "--max_steps", 2,
    )  # fmt: skip
    assert run_.returncode == 0, run_.stderr[-3000:]
    assert run_.stdout.count("Saved the model, its tokenizer and its card") == 1
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.slow
def test_the_recipe_learns_under_zero3_on_two_processes(tmp_path, monkeypatch):
    # the whole of it, the base's pretraining on the main process included
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    run_ = run(
        "-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/cpu_zero3.yaml",
        "--main_process_port", 0, "train.py", "--config", "recipes/letter_walk.yaml", "--output_dir", tmp_path / "out",
        "--max_steps", 40, "--per_device_train_batch_size", 32, "--save_strategy", "steps", "--save_steps", 40,
    )  # fmt: skip
    assert run_.returncode == 0, run_.stderr[-3000:]
    state = json.loads((tmp_path / "out" / "checkpoint-40" / "trainer_state.json").read_text())
    rewards = [line["on_policy/reward"] for line in state["log_history"] if "loss" in line]
    assert rewards[0] < 0.5 < rewards[-1]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert accuracy(model, tokenizer, split_walks(train_size=1, test_size=128, seed=7)["test"]) > 0.5


@pytest.mark.slow
@pytest.mark.parametrize(("text", "cause"), [('{"prompt": "a", "comp', "JSON"), ("", "holds no rows")])
def test_files_that_cannot_be_read_are_named(tmp_path, tiny_model_dir, text, cause):
    (tmp_path / "data.jsonl").write_text(text)
    run_ = run(
        ROOT / "train.py", "--model_name_or_path", tiny_model_dir, "--dataset_name", "data.jsonl",
        "--reward_funcs", "letter_walk_reward", "--output_dir", "out", *CPU, cwd=tmp_path,
    )  # fmt: skip
    assert run_.returncode == 2
    last = run_.stderr.strip().splitlines()[-1]
    assert last.startswith("train.py: error: --dataset_name data.jsonl cannot be read")
    assert cause in last


@pytest.mark.slow
def test_own_data_and_own_reward(tmp_path, tiny_model_dir):
    rows = to_dataset(split_walks(train_size=8, test_size=1)["train"])
    rows.to_json(tmp_path / "data.jsonl")
    (tmp_path / "my_rewards.py").write_text(
        "def length(completions, **kwargs):\n    return [len(text) / 20 for text in completions]\n"
    )
    run_ = run(
        ROOT / "train.py", "--model_name_or_path", tiny_model_dir, "--dataset_name", "data.jsonl",
        "--reward_funcs", "my_rewards.length", "letter_walk_reward", "--output_dir", "out", "--num_generations", 4,
        "--max_completion_length", 16, "--max_steps", 2, "--logging_steps", 1, "--report_to", "none",
        "--save_strategy", "no", "--use_peft", *CPU, cwd=tmp_path,
    )  # fmt: skip
    assert run_.returncode == 0, run_.stderr[-3000:]
    assert "'rewards/length/mean'" in run_.stdout
    assert "'rewards/letter_walk_reward/mean'" in run_.stdout
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_bad_data_is_named_before_any_step(tmp_path, tiny_model_dir):
    rows = [{"prompt": "Da:", "completion": text, "solution": "b"} for text in ("b#b", "")]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run_ = run(
        ROOT / "train.py", "--model_name_or_path", tiny_model_dir, "--dataset_name", "data.jsonl",
        "--reward_funcs", "letter_walk_reward", "--output_dir", "out", *CPU, cwd=tmp_path,
    )  # fmt: skip
    assert run_.returncode == 2
    assert "train.py: error: Row 1: `completion` is empty" in run_.stderr.strip().splitlines()[-1]


# Real text

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


def build_text_model(texts: list[str], directory: Path) -> None:
    """A BPE tokenizer trained on the texts, and a small model with random weights."""
    tokenizer = Qwen2Tokenizer(chat_template=CHATML).train_new_from_iterator(
        texts,
        vocab_size=4000,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        new_special_tokens=["<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    tokenizer.eos_token = "<|im_end|>"
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


@pytest.mark.slow
@pytest.mark.shared_data
def test_real_traces_and_real_problems(shared_data, tmp_path):
    traces = json.loads((shared_data / "reasoning_traces.json").read_text())
    problems = pd.read_parquet(shared_data / "math_benchmarks.parquet").query("data_source == 'math'").head(11)
    demonstrations: dict[str, list] = {}
    for trace in traces:  # two teachers a problem
        content = f"<think>\n{trace['thinking']}\n</think>\n\n{trace['response']}"
        demonstrations.setdefault(trace["problem"], []).append([{"role": "assistant", "content": content}])
    answers = {trace["problem"]: trace["answer"] for trace in traces}
    rows = [
        {"prompt": [{"role": "user", "content": p}], "demonstrations": d, "solution": answers[p]}
        for p, d in demonstrations.items()
    ] + [
        {"prompt": list(row.prompt), "demonstrations": None, "solution": f"${row.reward_model['ground_truth']}$"}
        for row in problems.itertuples()
    ]
    assert len(rows) == 16
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    build_text_model([trace["thinking"] for trace in traces], tmp_path / "model")

    run_ = run(
        "train.py", "--model_name_or_path", tmp_path / "model", "--dataset_name", tmp_path / "data.jsonl",
        "--reward_funcs", "reasoning_accuracy_reward", "--output_dir", tmp_path / "out",
        "--num_generations", 4, "--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 4,
        "--max_completion_length", 1280, "--generation_kwargs", json.dumps({"max_new_tokens": 32}),
        "--max_steps", 4, "--logging_steps", 1, "--log_completions", "--save_strategy", "steps", "--save_steps", 4,
        "--gradient_checkpointing", "False", "--report_to", "none", *CPU,
    )  # fmt: skip
    assert run_.returncode == 0, run_.stderr[-3000:]

    log = json.loads((tmp_path / "out" / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    numbers = pd.DataFrame(log[:4]).drop(columns="step").astype(float)
    assert len(numbers) == 4
    by_name = numbers.notna().all()
    sometimes = {name for name in by_name.index if not by_name[name]}
    of_demonstrations = {name for name in by_name.index if name.startswith("off_policy/")}
    assert sometimes <= of_demonstrations | {"groups/push_to_pull"}  # steps without any
    assert not numbers.isin([float("inf"), float("-inf")]).any().any()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    texts = [d[0]["content"].removeprefix("<think>\n") for ds in demonstrations.values() for d in ds]
    fitting = {text for text in texts if len(tokenizer(text)["input_ids"]) + 1 <= 1280}
    assert 2 < len(fitting) < 10
    assert f"{10 - len(fitting)} demonstrations dropped and 0 truncated" in run_.stderr
    assert numbers["off_policy/dropped"].sum() == 10 - len(fitting)

    table = pd.concat(pd.read_parquet(path) for path in sorted((tmp_path / "out" / "completions").glob("*.parquet")))
    assert len(table) == 64
    for row in table.itertuples():
        problem = row.prompt[-1]["content"]
        # the prompt ends with <think> already, so the demonstration does not begin with it again
        assert row.demonstration == (row.completion[0]["content"] in fitting)
        assert row.demonstration <= (problem in demonstrations)
        assert row.reasoning_accuracy_reward == float(row.demonstration)
    guided = {row.prompt[-1]["content"] for row in table.itertuples() if row.demonstration}
    assert guided == {
        problem
        for problem, ds in demonstrations.items()
        if any(d[0]["content"].removeprefix("<think>\n") in fitting for d in ds)
    }
    assert table["demonstration"].sum() == len(guided)


# SFT, then RL


def test_sft_takes_every_demonstration_once():
    several = [["1", "2"], [], ["3"]]
    rows = Dataset.from_dict({"prompt": ["a", "b", "c"], "demonstrations": several, "solution": [""] * 3})
    assert to_prompt_completion(rows).to_list() == [
        {"prompt": "a", "completion": "1"}, {"prompt": "a", "completion": "2"}, {"prompt": "c", "completion": "3"},
    ]  # fmt: skip
    rows = Dataset.from_dict({"prompt": ["a", "b"], "completion": [None, "1"]})
    assert to_prompt_completion(rows).to_list() == [{"prompt": "b", "completion": "1"}]
    # texts and messages mixed, which `train` takes: in the prompt's form
    message = [{"role": "assistant", "content": "1"}]
    rows = Dataset.from_list([{"prompt": "a", "completion": message}])
    assert to_prompt_completion(rows).to_list() == [{"prompt": "a", "completion": "1"}]
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": "a"}], "completion": "1"}])
    assert to_prompt_completion(rows)[0]["completion"] == message
    with pytest.raises(ValueError, match="Row 0: `completion` is empty"):
        to_prompt_completion(Dataset.from_dict({"prompt": ["a"], "completion": [" "]}))


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("image", "squares.png"),
        ("images", ["squares.png"]),
        ("prompt", [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "b"}]}]),
    ],
)
def test_sft_refuses_images(column, value):
    texts = {"prompt": [{"role": "user", "content": "a"}], "completion": "1"}
    if column == "prompt":
        texts["prompt"] = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    rows = Dataset.from_list([texts | ({} if column == "prompt" else {column: None}), texts | {column: value}])
    assert len(to_prompt_completion(rows.select([0]))) == 1
    with pytest.raises(ValueError, match=f"Row 1: `{column}` has an image, and luffy-trl sft trains on texts alone"):
        to_prompt_completion(rows)


def test_sft_then_rl(tiny_model_dir, tmp_path, capsys):
    data = tmp_path / "walks.jsonl"
    to_dataset(split_walks(train_size=16, test_size=1, length=4)["train"]).to_json(str(data))
    common = ["--dataset_name", str(data), "--report_to", "none", "--max_steps", "2", "--save_strategy", "no", *CPU]
    sft = ["sft", "--model_name_or_path", str(tiny_model_dir), "--output_dir", str(tmp_path / "sft"), *common]
    sft += ["--per_device_train_batch_size", "8", "--logging_steps", "1"]
    main(sft)
    assert "SFT on 16 demonstrations of 16 prompts" in capsys.readouterr().out
    main(["report", str(tmp_path / "sft"), "--output_dir", str(tmp_path / "report")])
    assert "2 panels, 0 completions" in capsys.readouterr().out
    main([*sft, "--eval_strategy", "steps", "--eval_steps", "1", "--dataset_test_split", "train"])
    out = capsys.readouterr().out
    assert "eval_loss" in out
    assert "Warning" not in out  # that run kept no checkpoint
    rl = ["train", "--model_name_or_path", str(tmp_path / "sft"), "--output_dir", str(tmp_path / "rl"), *common]
    sizes = ["--num_generations", "4", "--per_device_train_batch_size", "8", "--max_completion_length", "8"]
    main([*rl, *sizes, "--num_demonstrations", "0", "--reward_funcs", "letter_walk_reward"])
    assert (tmp_path / "rl" / "model.safetensors").is_file()


def test_the_card_of_sft_names_its_base_its_data_and_its_command(tiny_model_dir, tmp_path):
    command = ["sft", "--model_name_or_path", str(tiny_model_dir), "--dataset_name", "letter_walk", *CPU]
    main([*command, "--output_dir", str(tmp_path / "mine"), "--max_steps", "1", "--report_to", "none"])
    card = (tmp_path / "mine" / "README.md").read_text()
    assert "None" not in card
    assert card.startswith("---\n")
    assert "# Model Card for mine" in card
    assert f"fine-tuned version of `{tiny_model_dir.name}`, which is not on the Hub." in card
    assert "The data is the embedded letter walk, which `luffy_trl` generates." in card
    shown = f"luffy-trl sft --model_name_or_path {tiny_model_dir.name} --dataset_name letter_walk"
    assert f"The command was\n\n```bash\n{shown}" in card
    assert str(tmp_path) not in card


def test_sft_resumes_from_the_newest_checkpoint_that_is_whole(tiny_model_dir, tmp_path, capsys):
    sft = ["sft", "--model_name_or_path", str(tiny_model_dir), "--dataset_name", "letter_walk", "--save_steps", "1"]
    sft += ["--output_dir", str(tmp_path), "--report_to", "none", *CPU, "--resume_from_checkpoint", "auto"]
    main([*sft, "--max_steps", "2"])
    (tmp_path / "checkpoint-2" / "trainer_state.json").unlink()  # the last that is written
    assert "Warning" not in capsys.readouterr().out
    main([*sft[:-2], "--max_steps", "1"])
    assert f"Warning: {tmp_path} holds checkpoint-2 of an earlier run." in capsys.readouterr().out
    main([*sft, "--max_steps", "3"])
    assert f"Resuming from {tmp_path / 'checkpoint-1'}" in capsys.readouterr().out
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert state["global_step"] == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--reward_funcs", "math_reward"], "--reward_funcs: SFT looks at no reward"),
        (["--num_demonstrations", "1"], "unknown arguments: --num_demonstrations 1"),
        (["--model_name_or_path", "m"], "--dataset_name is missing"),
    ],
)
def test_wrong_flags_of_sft(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["sft", *CPU, *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_data_that_cannot_be_used_is_one_line(tiny_model_dir, tmp_path, capsys):
    data = tmp_path / "rows.jsonl"
    more = ["--reward_funcs", "letter_walk_reward", "--report_to", "none", "--max_completion_length", "16"]
    more += ["--output_dir", str(tmp_path / "out")]
    data.write_text(json.dumps({"prompt": "Da:", "completion": "b" * 99, "solution": "b"}) + "\n")
    with pytest.raises(SystemExit) as stop:
        main(["train", "--model_name_or_path", str(tiny_model_dir), "--dataset_name", str(data), *CPU, *more])
    assert stop.value.code == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert line.startswith("luffy-trl train: error: None of the 1 prompts has a usable demonstration")


def table(tmp_path, **columns) -> str:
    path = tmp_path / "table.jsonl"
    Dataset.from_dict(columns).to_json(str(path))
    return str(path)


@pytest.mark.parametrize(
    ("columns", "reward", "message"),
    [
        (
            {"answer": ["b"]},
            "accuracy_reward",
            "accuracy_reward needs the column 'solution', and the train_dataset of --dataset_name",
        ),
        ({"answer": ["b"]}, "math_reward", "math_reward needs the column 'solution'"),
        ({"solution": ["b"]}, "accuracy_reward", "accuracy_reward reads conversations, and the prompts of"),
    ],
)
def test_what_a_reward_cannot_read_is_said_before_training(columns, reward, message, tiny_model_dir, tmp_path, capsys):
    data = table(tmp_path, prompt=["Da:"], completion=["b"], **columns)
    flags = ["--model_name_or_path", str(tiny_model_dir), "--dataset_name", data, "--reward_funcs", reward]
    with pytest.raises(SystemExit) as stop:
        main(["train", *flags, *CPU, "--report_to", "none", "--output_dir", str(tmp_path / "out")])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("answers", [[56, 21], [5.5, 2.0]])
def test_numbers_in_solution_are_read_as_text(answers, chat_model_dir, tmp_path, capsys):
    boxed = [f"It is \\boxed{{{answer}}}" for answer in answers]
    data = table(tmp_path, prompt=["7 * 8?", "12 + 9?"], completion=boxed, solution=answers)
    sizes = ["--num_generations", "2", "--per_device_train_batch_size", "4", "--max_completion_length", "24"]
    flags = ["--model_name_or_path", str(chat_model_dir), "--dataset_name", data, "--max_steps", "1", *sizes]
    flags += ["--reward_funcs", "math_reward_optional_thought", "--output_dir", str(tmp_path / "out"), *CPU]
    main(["train", *flags, "--report_to", "none", "--logging_steps", "1"])
    assert "Reward of demonstrations: 1.000 when first logged" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["train", "sft"])
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model_name_or_path", "no/no", "--dataset_name", "letter_walk"], "--model_name_or_path no/no cannot be"),
        (["--dataset_name", "nobody/nothing", "--model_name_or_path", "MODEL"], "nobody/nothing"),
        (["--attn_implementation", "flash_attention_2"], "flash_attention_2 needs a GPU and a kernel of the Hub"),
    ],
)
def test_what_cannot_be_had_is_said_without_a_traceback(command, flags, message, tiny_model_dir, tmp_path, capsys):
    flags = [str(tiny_model_dir) if flag == "MODEL" else flag for flag in flags]
    reward = ["--reward_funcs", "letter_walk_reward"] if command == "train" else []
    with pytest.raises(SystemExit) as stop:
        main([command, *flags, *reward, *CPU, "--report_to", "none", "--output_dir", str(tmp_path / "out")])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert f"luffy-trl {command}: error: " in err
    assert message in err
