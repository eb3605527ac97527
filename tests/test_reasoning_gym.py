"""reasoning-gym as a source of problems: two splits without a common one, its own scorers, no Python in an answer."""

import hashlib
import itertools
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


MEASURED_ROWS = "5cfb8523abfa22086d82f182780406db0b9b26064dea5be94ceb9140bdea0636"
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
    row = split(f"{SUMS},size=3")[0]
    entry = create_dataset("chain_sum", min_terms=3, max_terms=3, max_digits=1, seed=0, size=500)[row["task_index"]]
    assert row["prompt"][1]["content"] == entry["question"]
    assert row["solution"] == entry["answer"]


def test_the_problems_of_measured_results_stay_what_they_are():
    """Those of the data that benchmarks/results were measured on, whose seed is 0."""
    splits = load_splits(
        "reasoning_gym:chain_sum,min_terms=3,max_terms=3,max_digits=1,size=600,test_size=128,seed=0", ""
    )
    rows = json.dumps([splits["train"].to_list(), splits["test"].to_list()], sort_keys=True)
    assert hashlib.sha256(rows.encode()).hexdigest() == MEASURED_ROWS
    assert splits["train"][0]["task"].endswith(",seed=0")


@pytest.mark.parametrize("name", ["chain_sum", "gcd", "word_sequence_reversal"])
def test_another_seed_has_other_problems(name):
    """Where there are problems enough, even of a seed that is near: reasoning-gym's own seeds only shift the list."""
    trained = set(questions(split(f"reasoning_gym:{name},size=400,test_size=0,seed=0")))
    for seed in (1, 100):
        tested = questions(split(f"reasoning_gym:{name},size=1,test_size=50,seed={seed}", "test"))
        assert len(tested) == 50
        assert len(trained.intersection(tested)) <= 1


def test_seeds_are_far_apart_and_leave_numpy_room():
    seeds = sorted(json.loads(parse_task(f"{SUMS},seed={seed}").source.rpartition("=")[2]) for seed in range(1000))
    assert seeds[0] == 0
    assert min(after - before for before, after in itertools.pairwise(seeds)) > 100_000
    assert seeds[-1] < 2**31
    [problem] = ask([{"source": parse_task("reasoning_gym:pool_matrix,seed=999").source, "index": 10_000_000}])
    assert "question" in problem


def test_no_problem_is_there_twice_in_other_words():
    """The same program under two wordings, for one."""
    texts = questions(split("reasoning_gym:bf,test_size=0,size=300"))
    programs = [re.findall(r"[-+<>.,\[\]]{9,}", text)[0] for text in texts]
    assert len(programs) == len(set(programs)) == 300


@pytest.mark.parametrize("name", ["game_of_life", "modulo_grid", "sentence_reordering", "acre"])
def test_problems_of_the_same_kind_are_not_taken_for_one(name):
    """Their metadata says little or nothing of the problem, and answers come again."""
    replies = ask([{"source": parse_task(f"reasoning_gym:{name}").source, "index": index} for index in range(60)])
    asked = [" ".join(reply["question"].split()) for reply in replies]
    rows = split(f"reasoning_gym:{name},size=1,test_size={len(set(asked))}", "test")
    assert rows["task_index"] == sorted({question: asked.index(question) for question in asked}.values())


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
        (
            "chain_sum,min_digits=1.5,max_digits=2,size=5,test_size=1",
            "no problem can be made with these options (ValueError: non-",
        ),
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


@pytest.mark.parametrize(
    ("task", "index"), [(SUMS, -1), (SUMS, None), (SUMS, "x"), (SUMS, 1.0), (None, 1), ("reasoning_gym:chain_sun", 1)]
)
def test_what_names_no_problem_is_refused(task, index):
    with pytest.raises(ValueError, match=r"is no problem of reasoning-gym|has no task chain_sun"):
        reasoning_gym_reward(["\\boxed{1}"], task=[task], task_index=[index])


def test_an_answer_to_a_problem_that_cannot_be_made_is_no_wrong_answer():
    source = parse_task("reasoning_gym:chain_sum,min_digits=1.5,max_digits=2").source
    with pytest.raises(ValueError, match=r"Row 0: reasoning-gym makes no problem of .* \(ValueError: non-"):
        reasoning_gym_reward(["\\boxed{1}"], task=[source], task_index=[0])


def test_problems_that_cannot_be_made_are_counted(capsys):
    """Of words that few sentences have enough of."""
    name = "reasoning_gym:letter_jumble,min_words=1,max_words=50,min_word_len=14,max_word_len=64,size=8,test_size=2"
    splits = load_splits(name, name)
    made = [*splits["test"]["task_index"], *splits["train"]["task_index"]]
    sources = [{"source": splits["train"]["task"][0], "index": index} for index in range(made[-1])]
    failed = sum("failed" in reply for reply in ask(sources))
    assert failed > 0
    assert f"{failed} problems could not be made, and were left out." in capsys.readouterr().out


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
