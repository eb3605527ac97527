"""reasoning-gym as a source of problems: two splits without a common one, its own scorers, no Python in an answer."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from reasoning_gym import create_dataset
from reasoning_gym.factory import DATASETS

from luffy_trl.commands.cli import main
from luffy_trl.data.loading import load_splits
from luffy_trl.tasks.gym import parse_task
from luffy_trl.tasks.gym_oracles import ORACLES, worked_solution
from luffy_trl.tasks.gym_reward import final_answer, reasoning_gym_reward, reasoning_gym_solved_reward
from luffy_trl.tasks.gym_splits import LIMITS, ask


SUMS = "reasoning_gym:chain_sum,min_terms=3,max_terms=3,max_digits=1"
# A task that mixes others, and needs them named in a form of its own
TASKS = sorted(set(DATASETS) - {"composite"})


def split(name, part="train"):
    return load_splits(name, name)[part]


def questions(dataset):
    return [prompt[-1]["content"] for prompt in dataset["prompt"]]


def test_no_problem_is_in_both_splits_nor_twice_in_one():
    # 200 questions are all there are: two digits, and a sign between them
    splits = load_splits("reasoning_gym:chain_sum,min_terms=2,max_terms=2,max_digits=1,size=150,test_size=40", "")
    everything = questions(splits["train"]) + questions(splits["test"])
    assert len(everything) == len(set(everything)) == 190


def test_the_test_split_stays_whatever_the_size_of_the_other():
    small, large = (split(f"{SUMS},size={size},test_size=20", "test") for size in (5, 200))
    assert small.to_list() == large.to_list()


def test_a_problem_is_the_same_in_every_process():
    made = f"gym_splits({SUMS + ',size=4'!r})['train'].to_list()"
    code = f"from luffy_trl.tasks.gym_splits import gym_splits; print({made})"
    run = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout for _ in range(2)]
    assert run[0] == run[1]
    assert "State the final answer" in run[0]


def test_rows_are_the_librarys_problems():
    row = split(f"{SUMS},size=3,seed=5")[0]
    entry = create_dataset("chain_sum", min_terms=3, max_terms=3, max_digits=1, seed=5, size=500)[row["task_index"]]
    assert row["prompt"][1]["content"] == entry["question"]
    assert row["solution"] == entry["answer"]


@pytest.mark.parametrize("name", sorted(ORACLES))
def test_worked_solutions_are_right_by_the_tasks_own_scorer(name):
    rows = split(f"reasoning_gym:{name},size=60,test_size=0")
    rewards = reasoning_gym_reward(rows["completion"], task=rows["task"], task_index=rows["task_index"])
    assert rewards == [1.0] * 60


def test_partial_sums_are_written_down():
    entry = {"answer": "-4", "metadata": {"expression": "4 - 1 - 7"}}
    assert worked_solution("chain_sum", entry) == "4 - 1 = 3\n3 - 7 = -4\n\\boxed{-4}"
    assert worked_solution("maze", entry) is None


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("First \\boxed{1}, no: \\boxed{2}", "2"),
        ("<think>\\boxed{1}</think> It is <answer> a, b </answer>", "a, b"),
        ("\\boxed{\\text{a, b}}", "a, b"),
        ("It is 2.", None),
        ("\\boxed{2", None),
        ("<think>\\boxed{1}</think> It is 2.", None),
    ],
)
def test_the_last_box_is_the_answer(text, answer):
    assert final_answer(text) == answer


def test_partly_right_answers_get_the_librarys_score():
    row = split(f"{SUMS},size=1")[0]
    [score] = reasoning_gym_reward(
        [f"\\boxed{{it is {row['solution']}}}"], task=[row["task"]], task_index=[row["task_index"]]
    )
    assert score == pytest.approx(len(row["solution"]) / len(f"it is {row['solution']}"))


def test_one_reward_is_for_whole_answers_alone():
    row = split(f"{SUMS},size=1")[0]
    texts = [f"\\boxed{{1{row['solution']}}}", f"\\boxed{{{row['solution']}}}", row["solution"]]
    columns = {"task": [row["task"]] * 3, "task_index": [row["task_index"]] * 3}
    assert reasoning_gym_reward(texts, **columns)[0] > 0.3
    assert reasoning_gym_solved_reward(texts, **columns) == [0.0, 1.0, 0.0]


def test_no_answer_is_run_and_right_ones_are_right(tmp_path):
    """Whoever wrote a task's scorer, and whatever it does with an answer."""
    bait = tmp_path / "bait"
    code = f"open({str(bait)!r}, 'w').close()"
    hostile = [
        f"__import__('os').system('touch {bait}')",
        f"[exec({code!r})]",
        f"exec({code!r})",
        f"[x for x in [exec({code!r})]]",
        f"(lambda: exec({code!r}))()",
        f"{{'a': exec({code!r})}}",
        f"print({code!r})\n{code}",
    ]
    sources = [{"source": parse_task(f"reasoning_gym:{name}").source, "index": 1} for name in TASKS]
    problems = ask(sources)
    texts = [[*hostile, problem["solution"] or ""] for problem in problems]
    replies = iter(
        ask([source | {"answer": text} for source, own in zip(sources, texts, strict=True) for text in own])
    )
    scores = {name: [next(replies)["score"] for _ in own] for name, own in zip(TASKS, texts, strict=True)}
    assert not bait.exists()
    assert {name for name, (*wrong, _) in scores.items() if 1 in wrong} == {"game_of_life_halting"}  # takes any text
    without_answer = {name for name, problem in zip(TASKS, problems, strict=True) if problem["solution"] is None}
    assert {name for name, (*_, right) in scores.items() if right != 1} == without_answer


def test_an_answer_that_hangs_its_scorer_is_wrong(monkeypatch):
    monkeypatch.setitem(LIMITS, "timeout", 3.0)
    source = parse_task("reasoning_gym:countdown").source
    answers = ["\\boxed{9**9**9**9}", "\\boxed{1}"]
    assert reasoning_gym_reward(answers, task=[source] * 2, task_index=[0, 0])[0] == 0.0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("chain_sun", "has no task chain_sun. Is it chain_sum"),
        ("chain_sum,terms=3", "chain_sum has no option terms. It has allow_negation, max_digits"),
        ("chain_sum,min_terms=4,max_terms=3", "max_terms must be >= min_terms"),
        ("chain_sum,min_terms=few", "not supported between"),
        ("chain_sum,min_terms=1,max_terms=1,max_digits=1", "different problems, but 1100 are asked for"),
        ("chain_sum,size=0", "size=0 must be a whole number of 1 or more"),
        ("chain_sum,size", "'size' is no option"),
        ("", "names no task"),
    ],
)
def test_what_cannot_be_made_is_one_sentence(name, message, tmp_path, capsys, tiny_model_dir):
    arguments = ["--model_name_or_path", str(tiny_model_dir), "--dataset_name", f"reasoning_gym:{name}"]
    with pytest.raises(SystemExit) as stop:
        main(["train", *arguments, "--output_dir", str(tmp_path), "--use_cpu", "--bf16", "False"])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_dataset_without_its_columns_is_refused():
    with pytest.raises(ValueError, match="needs the columns `task` and `task_index`"):
        reasoning_gym_reward(["\\boxed{1}"], solution=["1"])


def test_the_commands_of_the_docs_are_taken(tmp_path, chat_model_dir, capsys):
    """As printed, but for a tiny model, the CPU, and fewer steps and problems."""
    page = (Path(__file__).parents[1] / "docs" / "tasks.md").read_text()
    [block] = re.findall(r"```bash\n(luffy-trl train .*?)```", page, flags=re.DOTALL)
    model, out = tmp_path / "model", tmp_path / "sums"
    block = block.replace("Qwen/Qwen2.5-0.5B-Instruct", str(model)).replace("out/sums", str(out))
    train, evaluate = block.replace("evals/sums", str(tmp_path / "evals")).replace("\\\n", " ").strip().split("\n")
    train += (
        " --use_cpu --bf16 False --max_steps 2 --num_generations 4 --per_device_train_batch_size 4 "
        "--max_completion_length 48 --logging_steps 1 --eval_strategy steps --eval_steps 2 --report_to none"
    )
    evaluate += " --device cpu --max_new_tokens 4 --limit 2"
    prepare = f"luffy-trl prepare-model --model_name_or_path {chat_model_dir} --output_dir {model} --template chatml"
    for command in (prepare, train, evaluate):
        main(command.split()[1:])
    [logs] = [json.loads(path.read_text())["log_history"] for path in out.glob("checkpoint-*/trainer_state.json")]
    assert logs[0]["off_policy/reward"] == 1
    assert any("eval_reward" in log for log in logs)
    [summary] = json.loads((tmp_path / "evals" / "results.json").read_text())["tasks"].values()
    assert (summary["problems"], summary["score"]) == (2, 0.0)


def test_prepare_data_writes_it_down(tmp_path):
    main(["prepare-data", f"{SUMS},size=20", "--output-dir", str(tmp_path / "out"), "--no-length", "--no-verify"])
    rows = split(str(tmp_path / "out"))
    assert len(rows) == 20
    assert rows[0]["completion"][0]["content"].endswith(f"\\boxed{{{rows[0]['solution']}}}")
