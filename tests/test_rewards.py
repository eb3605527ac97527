"""Rewards: right about real answers, and standing whatever a completion holds."""

import json
import logging
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from fractions import Fraction

import pandas as pd
import psutil
import pytest

from luffy_trl.rewards import (
    ChoiceReward,
    MathReward,
    answer_part,
    choice_letter,
    choice_reward,
    format_reward,
    math_reward,
    serving,
    verification,
    verify_math,
)
from luffy_trl.rewards.pool import default_workers
from luffy_trl.rewards.verification import judge_math


HANGS = "\\boxed{9^{9^{9^9}}}"


def boxed(answer: str) -> str:
    return f"So the answer is \\boxed{{{answer}}}."


def workers_of(process: psutil.Process) -> list[psutil.Process]:
    return [child for child in process.children() if "luffy_trl.rewards.worker" in child.cmdline()]


@pytest.fixture
def fresh(monkeypatch):
    """A pool without workers, and nothing remembered."""
    monkeypatch.setattr(verification, "_verifier", verification.Verifier())
    yield verification._verifier
    verification._verifier.pools.close()


# Real problems


@pytest.fixture
def golds(shared_data) -> list[str]:
    problems = pd.read_parquet(shared_data / "math_benchmarks.parquet")
    return [row["ground_truth"] for row in problems.reward_model]


@pytest.mark.shared_data
def test_the_gold_answers_of_real_problems_in_a_box_are_right(golds):
    assert len(golds) == 1590
    missed = {
        gold: equal for gold, equal in zip(golds, verify_math(map_boxed(golds), golds), strict=True) if not equal
    }
    # 99.94%: the one left is a sentence, which no answer can be compared with
    assert [(gold[:40], equal) for gold, equal in missed.items()] == [
        ("$f(x)=a x+b$, where $b$ is an arbitrary ", None)
    ]


@pytest.mark.shared_data
def test_the_gold_answer_of_another_problem_is_wrong_unless_the_two_are_equal(golds):
    others = golds[1:] + golds[:1]
    verdicts = verify_math(map_boxed(others), golds)
    pairs = list(zip(golds, others, verdicts, strict=True))
    assert [(a, b) for a, b, equal in pairs if equal and not same_text_or_number(a, b)] == [("5", "x=5")]
    assert [(a, b) for a, b, equal in pairs if equal is False and same_text_or_number(a, b)] == []
    assert verdicts.count(True) == 11


def map_boxed(answers: list[str]) -> list[str]:
    return [boxed(answer) for answer in answers]


def same_text_or_number(a: str, b: str) -> bool:
    try:
        return Fraction(a) == Fraction(b)
    except ValueError:
        return a.split() == b.split()


# What counts as an answer


@pytest.mark.parametrize(
    ("answer", "gold", "equal"),
    [
        ("\\boxed{\\frac12}", "0.5", True),
        ("\\boxed{0.5}", "$\\frac{1}{2}$", True),
        ("The answer is $11\\sqrt2$.", "11\\sqrt{2}", True),
        ("\\boxed{(3, \\tfrac{\\pi}{2})}", "\\left( 3, \\frac{\\pi}{2} \\right)", True),
        ("\\boxed{x = 5}", "5", True),
        ("\\boxed{2, 1}", "\\boxed{1, 2}", True),
        ("\\boxed{7} is wrong, it is \\boxed{8}", "8", True),
        ("\\boxed{7} is wrong, it is \\boxed{8}", "7", False),
        ("\\boxed{1} or $x = \\boxed{2}$", "1, 2", True),
        ("$\\boxed{1}$, $\\boxed{2}$, and $\\boxed{3}$", "1, 2, 3", True),
        ("\\boxed{1} \\boxed{2}", "1", False),  # not a net to catch an answer with
        ("\\boxed{(2, 1)}", "(1, 2)", False),
        ("\\boxed{11}", "11\\sqrt{2}", False),
        ("The answer is clear.", "5", False),
        ("", "5", False),
        (" \n", "5", False),
        ("5" * 20_000 + "\\boxed{5}", "5", True),  # the end of a long answer is read
        ("\\boxed{5}" + " " * 20_000, "5", False),
        ("\\boxed{5}", "", None),
        ("\\boxed{5}", "\\frac{1}{2", None),
        ("", "Natalia sold 48 clips in April, so she sold 72 altogether.", None),
    ],
)
def test_answers_against_gold_answers(answer, gold, equal):
    assert verify_math([answer], [gold]) == [equal]


def test_only_what_follows_the_thought_is_read():
    text = "<think>2 or </think> \\boxed{3}? </think> \\boxed{4}"
    assert [answer_part(text, mode=mode) for mode in ("required", "optional")] == [" \\boxed{4}"] * 2
    assert [answer_part("4", mode=mode) for mode in ("required", "optional", "unused")] == [None, "4", "4"]
    assert answer_part("a [/t] b", "[/t]") == " b"

    completions = [text, "\\boxed{4}", "\\boxed{4} </think> 4", "</think>", ""]
    assert math_reward(completions, solution=["4"] * 5) == [1, 0, 0, 0, 0]
    assert MathReward(thought="optional")(completions, solution=["4"] * 5) == [1, 1, 0, 0, 0]
    assert MathReward(thought="unused")(completions, solution=["4"] * 5) == [1, 1, 1, 0, 0]


def test_completions_may_be_text_or_messages():
    completions = [
        "</think>\\boxed{4}",
        [{"role": "assistant", "content": "</think>\\boxed{4}"}],
        [{"role": "assistant", "content": "</think>\\boxed{4}"}, {"role": "tool"}, {"content": "</think>\\boxed{5}"}],
        [{"role": "assistant", "reasoning_content": "Two and two.", "content": "\\boxed{4}"}],
        [{"role": "assistant", "content": None}],
        [],
    ]
    assert math_reward(completions, solution=["4"] * 6) == [1, 1, 0, 1, 0, 0]
    assert format_reward(completions[3:]) == [1, 0, 0]
    assert math_reward([], solution=[]) == []


def test_a_gold_answer_that_cannot_be_parsed_gives_none_and_one_warning(caplog):
    rewards = [MathReward(), ChoiceReward()]
    with caplog.at_level(logging.WARNING, "luffy_trl.rewards"):
        for reward in rewards * 2:
            solution = ["\\frac{1}{2", None, "\\frac{1}{2", "B"]
            assert reward(["</think>\\boxed{B}"] * 4, solution=solution) == [None, None, None, 1.0]
    assert len(caplog.messages) == 4
    assert "math_reward: the gold answer '\\\\frac{1}{2' in column `solution` cannot be parsed" in caplog.messages[0]


def test_reasons_go_to_the_completions_table():
    columns, metrics = {}, {}
    reward = MathReward(timeout=1)
    solution = ["0.5", "1", "1", "1", ""]
    completions = ["</think>\\boxed{\\frac12}", "</think>\\boxed{2}", "</think>No.", f"</think>{HANGS}", "</think>"]
    reward(completions, solution=solution, log_extra=columns.__setitem__, log_metric=metrics.__setitem__)
    assert columns == {
        "math_answer": ["\\frac{1}{2}", "2", "", "", ""],
        "math_outcome": ["equal", "different", "no answer", "time limit", "gold not parsed"],
    }
    assert metrics == {"math_reward/over_limit": 0.2}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MathReward(thought="maybe"), "thought='maybe' must be one of 'required', 'optional', 'unused'"),
        (lambda: ChoiceReward(delimiter=""), "delimiter is empty"),
        (lambda: MathReward(timeout=0), "timeout=0 must be a positive number of seconds"),
        (lambda: MathReward(memory_limit=64), "memory_limit=64 must be 256 MiB or more"),
        (lambda: MathReward(workers=0), "workers=0 must be 1 or more"),
        (lambda: math_reward(["4"]), "math_reward needs the dataset's column `solution`"),
        (lambda: math_reward(["4"], solution=["4", "5"]), "1 completions, but 2 solutions"),
        (lambda: choice_reward(["4"], solution=[4]), "choice_reward: `solution` is int 4, but must be text"),
        (lambda: verify_math(["4"], []), "1 answers, but 0 golds"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


# Choices and format


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("\\boxed{C}", "C"),
        ("\\boxed{c}", "C"),
        ("so \\(\\boxed{\\textbf{(C) } 42}\\)", "C"),
        ("\\boxed{A}, or rather \\boxed{J}. Answer: B", "J"),
        ("The answer is (C), not (D).", "C"),
        ("**Answer:** C", "C"),
        ("**Answer**: **C**", "C"),
        ("Answer: B. No. The correct option is $D$ since 2 > 1", "D"),
        ("The answer is A", "A"),
        ("The answer is A because it floats", "A"),
        ("B is tempting.\n\n**C**\n", "C"),
        ("(A)", "A"),
        ("C. 5 meters", "C"),
        ("A car is faster.", None),
        ("The answer is A car.", None),
        ("Answer: I think so", None),
        ("The answer is Carbon", None),
        ("It contains vitamin C", None),
        ("A. car\nB. bus\nC. train", None),
        ("\\boxed{42}", None),
        ("K", None),
        ("", None),
    ],
)
def test_the_letter_that_an_answer_settles_on(text, letter):
    assert choice_letter(text) == letter


def test_choices_are_graded_after_the_thought():
    completions = ["Answer: B</think>The answer is (C).", "The answer is (C).", "</think>\\boxed{B}", "</think>"]
    assert choice_reward(completions, solution=["C", "(C)", "\\boxed{C}", "C. 5 m"]) == [1, 0, 0, 0]


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("<think>\nTwo and two.\n</think>\n\n4", 1),
        ("Two and two.\n</think>\n\n4", 1),  # the prompt ended with <think>
        ("\n<think>a</think>b\n", 1),
        ("<think>a</think> \n", 0),
        ("<think> </think>b", 0),
        ("</think>b", 0),
        ("<think>a", 0),
        ("4", 0),
        ("<think>a</think>b</think>c", 0),
        ("<think>a<think>b</think>c", 0),
        ("First, <think>a</think>b", 0),
        ("", 0),
        ("<think>" * 100_000, 0),
    ],
)
def test_the_format_is_one_thought_then_an_answer(text, reward):
    assert format_reward([text]) == [reward]


# A thousand completions, some of them hostile

HOSTILE = [
    HANGS,
    "\\boxed{(10^{10^{10}})!}",
    "\\boxed{" + "{" * 100_000,
    "\\boxed{" + "{" * 4_000 + "1" + "}" * 4_000 + "}",
    "\\boxed{" + "(" * 4_000 + "1" + ")" * 4_000 + "}",
    "\\[\\boxed{a" * 900,  # catastrophic for Math-Verify's patterns
    "\\boxed{\\frac{1}{2",
    "\0\\boxed{\0\0 1}\ud800",
    "```python\nimport os; os.abort()\n```\\boxed{__import__('os').abort()}",
    "\\boxed{2^{2^{33}}}",
]


def benign(rng: random.Random, i: int) -> tuple[str, str, float]:
    """An answer, its gold and its reward, for numbers whose equality Python can tell."""
    gold = Fraction(rng.randint(-50, 50), rng.randint(1, 12))
    answer = gold if rng.random() < 0.5 else Fraction(rng.randint(-50, 50), rng.randint(1, 12))
    k = rng.randint(2, 5)
    box = f"\\boxed{{\\frac{{{answer.numerator * k}}}{{{answer.denominator * k}}}}}"
    text = f"{i}. Let $n = {k}$, then $x_{k} = \\frac{{{k}}}{{7}}$. {box}"
    return text, f"\\frac{{{gold.numerator}}}{{{gold.denominator}}}", float(answer == gold)


def test_a_thousand_completions_with_hostile_ones_among_them():
    rng = random.Random(0)
    rows = [benign(rng, i) for i in range(990)] + [(text, "1", 0.0) for text in HOSTILE]
    rng.shuffle(rows)
    completions = [[{"role": "assistant", "content": f"<think>{HANGS}</think>{text}"}] for text, _, _ in rows]
    reward = MathReward(timeout=2)
    assert reward(completions, solution=[gold for _, gold, _ in rows]) == [expected for _, _, expected in rows]
    assert 300 < sum(expected for _, _, expected in rows) < 700


def test_the_parents_memory_stays_flat(fresh, monkeypatch):
    monkeypatch.setattr(verification, "CACHE_SIZE", 100)
    reward = MathReward()

    def score(run: int) -> int:
        """Bytes of this process after 10 MB of new completions."""
        texts = [f"{run} {i}" + " " * 50_000 + f"</think>{' ' * 5_000}\\boxed{{{i}}}" for i in range(200)]
        assert reward(texts, solution=["7"] * 200).count(1.0) == 1
        return psutil.Process().memory_info().rss

    after = [score(run) for run in range(8)]
    assert after[-1] - after[2] < 5 * 2**20
    assert len(fresh.cache) == 100


def test_a_worker_is_replaced_when_half_of_its_memory_is_taken_or_it_has_served_long():
    assert not serving.is_spent(served=1, memory_limit=2**20)
    assert serving.is_spent(served=serving.MAX_SERVED, memory_limit=2**20)
    assert serving.is_spent(served=1, memory_limit=1)


def test_workers_stay_however_large_the_parent_is(fresh):
    assert psutil.Process().memory_info().rss > 128 * 2**20  # half of what a worker may have
    pids = set()
    for answer in ("\\boxed{2}", "\\boxed{3}"):
        assert judge_math([answer], ["1"], memory_limit=256)[0].outcome == "different"
        pids.add(fresh.pools.pool.workers[0].process.pid)
    assert len(pids) == 1


def test_an_answer_that_was_seen_before_costs_nothing(fresh):
    reward = MathReward(timeout=1)
    completions, solution = ["</think>\\boxed{4}", f"</think>{HANGS}", "</think>\\boxed{5}"], ["4", "4", "4"]
    assert reward(completions, solution=solution) == [1, 0, 0]
    fresh.pools.pool.close()
    assert reward(completions, solution=solution) == [1, 0, 0]
    assert fresh.pools.pool.workers == []  # nobody was asked
    assert MathReward(timeout=2)(completions[:1], solution=["4"]) == [1]  # another limit may have another outcome
    assert len(fresh.pools.pool.workers) == 1


# Workers


def test_workers_killed_from_outside_cost_nothing(fresh):
    answers = map_boxed([f"{n}^2" for n in range(400)])
    golds = [str(n * n) for n in range(400)]
    done = threading.Event()

    killed = []

    def kill_some():  # that have begun to work: one that never starts is another matter
        while not done.wait(0.05) and len(killed) < 2:
            ready = [w.process for w in list(fresh.pools.pool.workers) if w.ready and w.process.pid not in killed]
            if ready:
                ready[0].kill()
                killed.append(ready[0].pid)
                done.wait(1)

    killer = threading.Thread(target=kill_some)
    killer.start()
    try:
        assert verify_math(answers, golds) == [True] * 400
    finally:
        done.set()
        killer.join()
    assert killed


def test_several_threads_at_once(fresh):
    results = {}

    def verify(k: int) -> None:
        results[k] = verify_math(map_boxed([str(n + k) for n in range(20)]), [str(n) for n in range(20)])

    threads = [threading.Thread(target=verify, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {k: [k == 0] * 20 for k in range(4)}


def test_workers_that_cannot_start_are_an_error(fresh):
    fresh.pools.pool.module = "luffy_trl.rewards.no_such_worker"
    with pytest.raises(RuntimeError, match="Reward workers do not start \\(exit status 1\\)"):
        verify_math(["\\boxed{1}"], ["1"])
    assert fresh.pools.pool.workers == []


def test_how_many_workers(monkeypatch, fresh):
    cores = len(os.sched_getaffinity(0))
    monkeypatch.delenv("LUFFY_TRL_REWARD_WORKERS", raising=False)
    assert default_workers() == min(cores, 16)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(2 * cores))
    assert default_workers() == 1
    monkeypatch.setenv("LUFFY_TRL_REWARD_WORKERS", "3")
    verify_math(map_boxed(["1", "2", "3", "4"]), ["1"] * 4)
    assert len(fresh.pools.pool.workers) == 3
    monkeypatch.setenv("LUFFY_TRL_REWARD_WORKERS", "none")
    with pytest.raises(ValueError, match="LUFFY_TRL_REWARD_WORKERS='none' must be a whole number"):
        verify_math(["5"], ["5"])


# Programs that use the rewards, none of them with `if __name__ == "__main__"`

SCRIPT = """
import json, os, signal, sys, threading, time
import psutil
from luffy_trl.rewards import MathReward, math_reward
def pids():
    return [child.pid for child in psutil.Process().children()]
def say(value):
    print(json.dumps(value), flush=True)
rewards = math_reward(["</think>\\\\boxed{4}", "</think>\\\\boxed{5}"] * 4, solution=["4"] * 8)
"""
HANG = f"MathReward(timeout=100)(['</think>' + {HANGS!r}], solution=['4'])\n"


def start(code: str, how: str = "file", path=None) -> subprocess.Popen:
    if how == "file":
        path.write_text(SCRIPT + code)
    command = {"file": [str(path)], "-c": ["-c", SCRIPT + code], "stdin": ["-"]}[how]
    process = subprocess.Popen(
        [sys.executable, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    if how == "stdin":
        process.stdin.write(SCRIPT + code)
        process.stdin.close()
    return process


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 30
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids):
        assert time.monotonic() < deadline, f"still there: {pids}"
        time.sleep(0.05)


@pytest.mark.parametrize("how", ["file", "-c", "stdin"])
@pytest.mark.parametrize(
    ("ending", "status"),
    [("", 0), ("raise SystemExit(3)", 3), ("os._exit(4)", 4), ("os.kill(os.getpid(), signal.SIGKILL)", -9)],
    ids=["end", "exception", "_exit", "SIGKILL"],
)
def test_scripts_work_without_a_guard_and_leave_no_worker(how, ending, status, tmp_path):
    process = start(f"say([rewards, pids()])\n{ending}\n", how, tmp_path / "script.py")
    rewards, pids = json.loads(process.stdout.readline())
    assert rewards == [1, 0] * 4
    assert pids
    assert process.wait(60) == status, process.stderr.read()
    wait_until_gone(pids)


@pytest.mark.parametrize("signal_", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_ending_a_program_ends_workers_that_are_at_work(signal_, tmp_path):
    process = start("say(pids())\n" + HANG.replace("100", "5"), "file", tmp_path / "script.py")
    pids = json.loads(process.stdout.readline())
    time.sleep(0.5)
    process.send_signal(signal_)
    assert process.wait(10) == -signal_
    assert (process.stderr.read().strip().splitlines() or [""])[-1] == ("KeyboardInterrupt" if signal_ == 2 else "")
    wait_until_gone(pids)


def test_an_interrupted_call_leaves_nothing_to_the_next(tmp_path):
    code = f"""
threading.Timer(1, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
try:
    {HANG}
except KeyboardInterrupt:
    say(pids())
say(math_reward(["</think>\\\\boxed{{6}}"] * 3, solution=["6", "7", "6.0"]))
"""
    process = start(code, "file", tmp_path / "script.py")
    assert json.loads(process.stdout.readline()) == []
    assert json.loads(process.stdout.readline()) == [1, 0, 1]
    assert process.wait(60) == 0


def test_a_forked_child_has_workers_of_its_own(tmp_path):
    code = """
before = pids()
child = os.fork()
again = math_reward(["</think>\\\\boxed{7}"] * 4, solution=["7", "8", "7", "8"])
say([child != 0, before, pids(), again])
if child == 0:
    os._exit(0)
os.wait()
"""
    process = start(code, "file", tmp_path / "script.py")
    lines = [json.loads(line) for line in process.stdout]
    assert process.wait(60) == 0, process.stderr.read()
    (_, _, of_child, by_child), (_, before, of_parent, by_parent) = sorted(lines)
    assert by_child == by_parent == [1, 0, 1, 0]
    assert of_child
    assert set(before) <= set(of_parent)
    assert not set(before) & set(of_child)
    wait_until_gone(of_child + of_parent)


def test_the_memory_limit_is_the_kernels():
    code = "from luffy_trl.rewards.serving import limit_memory\nlimit_memory(512)\nbytearray(600 * 2**20)"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert process.stderr.strip().endswith("MemoryError")


def test_importing_the_rewards_imports_neither_torch_nor_trl():
    code = "import sys, luffy_trl.rewards; print({'torch', 'trl', 'transformers', 'sympy'} & set(sys.modules))"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "set()"


# In the trainer


def test_the_trainer_takes_them_and_logs_their_metrics(make_trainer, fresh):
    trainer = make_trainer(reward=[MathReward(thought="unused"), choice_reward, format_reward], logging_steps=1)
    trainer.train()
    logged = trainer.state.log_history[0]
    assert {"rewards/math_reward/mean", "rewards/format_reward/mean"} <= set(logged)
    assert logged["rewards/choice_reward/mean"] is None  # for every row: letters of the walk are no options
    assert logged["math_reward/over_limit"] == 0
    assert set(trainer._logs["extra"]["math_outcome"]) <= {"no answer", "different", "equal"}
