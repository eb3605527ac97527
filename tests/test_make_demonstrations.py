"""`luffy-trl make-demonstrations`: problems in, verified demonstrations out, and no question asked twice."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from luffy_trl.commands.cli import main
from luffy_trl.commands.make_demonstrations import build_parser
from luffy_trl.data.loading import load_splits
from luffy_trl.runs.lock import alone_in
from luffy_trl.runs.stopping import STOPPED_STATUS
from luffy_trl.teaching.selection import Rejection

from .conftest import HUNG, save_tiny_qwen2
from .hub_server import TOKEN, HubServer
from .teacher_server import KEY, Reply, TeacherServer


REWARD = "tests.teacher_server.boxed_reward"
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LONELY = "\ud83d"


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def problems(tmp_path) -> Path:
    """Four questions: twice 1, 2, 3 and 4."""
    path = tmp_path / "problems.jsonl"
    rows = [
        {"question": f"What is {i} + {i}?", "answer": str(2 * i), "level": [{"n": i}, "easy"][i % 2]}
        for i in range(1, 5)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def number(body: dict) -> int:
    """What a request asks to be doubled."""
    return int(re.search(r"What is (\d+)", body["messages"][-1]["content"])[1])


def right(body: dict) -> Reply:
    """A right answer, another one for each seed."""
    return Reply(f"{number(body)} twice is \\boxed{{{2 * number(body)}}}, by {body.get('seed')}.")


@pytest.fixture
def make(problems, tmp_path, capsys):
    """Run the command in this process; returns what it printed."""

    def run(*servers: TeacherServer, output: str = "out", **flags) -> str:
        given = {"dataset_name": problems, "output_dir": tmp_path / output, "reward_funcs": REWARD, "num_samples": 2}
        if servers:
            given |= {"teacher_url": [s.url for s in servers], "teacher_model": [f"m{i}" for i in range(len(servers))]}
        arguments = ["make-demonstrations"]
        for name, value in (given | {"max_retries": 2, "timeout": 20} | flags).items():
            values = value if isinstance(value, list) else [] if value is True else [value]
            arguments += [f"--{name}", *map(str, values)]
        main(arguments)
        return capsys.readouterr().out

    return run


def rows_of(directory: Path) -> list[dict]:
    return list(load_splits(str(directory), "out")["train"])


def rejected_in(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "rejected.jsonl").read_text().splitlines()]


def answers_in(directory: Path) -> list[dict]:
    lines = [line for path in (directory / "_answers").glob("*.jsonl") for line in path.read_text().split("\n")[:-1]]
    return [json.loads(line) for line in lines]


def refusal(call, capsys, status: int = 2) -> str:
    """The one sentence with which the command ends."""
    with pytest.raises(SystemExit) as stop:
        call()
    assert stop.value.code == status
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "Traceback" not in last
    return last


# What becomes of answers


def test_right_answers_become_demonstrations_and_others_are_listed_with_their_reason(make, tmp_path):
    def answer(body):
        said = right(body).content
        by_number = {
            1: Reply(said),
            2: Reply("It is \\boxed{5}."),  # twice the same: a duplicate
            3: Reply(said, finish="length"),
            4: Reply("  ", message={"reasoning_content": "Hm."}),
        }
        return by_number[number(body)]

    with TeacherServer(answer) as server:
        printed = make(server)
    rows, rejected = rows_of(tmp_path / "out"), rejected_in(tmp_path / "out")
    assert [row["solution"] for row in rows] == ["2", "4", "6", "8"]
    assert [len(row["demonstrations"]) for row in rows] == [2, 0, 0, 0]
    assert rows[0]["prompt"] == [{"role": "user", "content": "What is 1 + 1?"}]
    assert [row["level"] for row in rows] == ["easy", {"n": 2}, "easy", {"n": 4}]  # any column of the problems
    assert rows[0]["teacher"] == ["m0", "m0"]
    for [message] in rows[0]["demonstrations"]:
        assert message["role"] == "assistant"
        assert "\\boxed{2}" in message["content"]
    reasons = Counter((line["row"], line["reason"]) for line in rejected)
    assert reasons == {(1, "wrong"): 1, (1, "duplicate"): 1, (2, "unfinished"): 2, (3, "empty"): 2}
    assert {line["rewards"] and line["rewards"]["boxed_reward"] for line in rejected} == {0.0, None}
    assert "1 of 4 problems have a demonstration" in printed
    card = (tmp_path / "out" / "README.md").read_text()
    for line in ("| unfinished | 2 |", "| wrong | 1 |", "| m0 | 8 | 2 | 2 | 88 | 56 |", "temperature 1.0"):
        assert line in card


def test_the_math_reward_tells_a_wrong_answer_from_none_and_from_an_unreadable_gold(make, problems, tmp_path):
    problems.write_text(problems.read_text().replace('"8"', '"$"'))
    said = {1: "It is \\boxed{2}.", 2: "It is \\boxed{5}.", 3: "I do not know.", 4: "It is \\boxed{8}."}
    with TeacherServer(lambda body: Reply(said[number(body)])) as server:
        make(server, reward_funcs="math_reward_optional_thought", num_samples=1, max_demonstrations=1)
    assert [row["completion"] and row["completion"][0]["content"] for row in rows_of(tmp_path / "out")] == [
        said[1], None, None, None,
    ]  # fmt: skip
    reasons = [(line["row"], line["reason"]) for line in rejected_in(tmp_path / "out")]
    assert reasons == [(1, "wrong"), (2, "no answer found"), (3, "not graded")]


@pytest.mark.parametrize(
    ("select", "maximum", "expected"),
    [("all", None, ["short", "longer one", "mid one"]), ("all", 2, ["short", "longer one"]),
     ("shortest", None, ["short"]), ("shortest", 2, ["short", "mid one"])],
)  # fmt: skip
def test_which_right_answers_are_kept(make, tmp_path, select, maximum, expected):
    """Teachers side by side: the first answer of each, then the second of each."""
    texts = [["short", "mid one"], ["longer one", "short"]]
    told = [Counter(), Counter()]

    def answers_of(teacher):
        def answer(body):
            i = told[teacher][number(body)]
            told[teacher][number(body)] += 1
            return Reply(f"{texts[teacher][i]} \\boxed{{{2 * number(body)}}}")

        return answer

    with TeacherServer(answers_of(0)) as first, TeacherServer(answers_of(1)) as second:
        flags = {} if maximum is None else {"max_demonstrations": maximum}
        make(first, second, select=select, concurrency=1, **flags)
    for row in rows_of(tmp_path / "out"):
        kept = row["demonstrations"] if "demonstrations" in row else [row["completion"]]
        assert [one[0]["content"].split(" \\")[0] for one in kept] == expected
        teachers = row["teacher"] if isinstance(row["teacher"], list) else [row["teacher"]]
        assert teachers == [{"longer one": "m1"}.get(text, "m0") for text in expected]
    reasons = Counter(line["reason"] for line in rejected_in(tmp_path / "out"))
    assert reasons == Counter({"duplicate": 4, "right, not selected": 4 * (3 - len(expected))}) + Counter()


def test_a_thought_that_comes_apart_is_put_in_front(make, tmp_path):
    kinds = {
        1: Reply("\n\n\\boxed{2}", message={"reasoning_content": "\nOne and one.\n"}),
        2: Reply("\\boxed{4}", message={"reasoning_content": None, "reasoning": "Two and two."}),
        3: Reply("Three and three.\n</think>\n\n\\boxed{6}"),
        4: Reply([{"type": "text", "text": "<think>\nFour.\n</think>\n\n"}, {"type": "text", "text": "\\boxed{8}"}]),
    }
    with TeacherServer(lambda body: kinds[number(body)]) as server:
        make(server, num_samples=1, max_demonstrations=1)
    assert [row["completion"][0]["content"] for row in rows_of(tmp_path / "out")] == [
        "<think>\nOne and one.\n</think>\n\n\\boxed{2}",
        "<think>\nTwo and two.\n</think>\n\n\\boxed{4}",
        "<think>\nThree and three.\n</think>\n\n\\boxed{6}",
        "<think>\nFour.\n</think>\n\n\\boxed{8}",
    ]


def test_demonstrations_that_are_there_are_graded_and_kept_before_new_ones(make, tmp_path, problems):
    rows = [
        {"prompt": "What is 1 + 1?", "completion": "\\boxed{2} of old", "solution": "2", "teacher": "old"},
        {"prompt": "What is 2 + 2?", "completion": "\\boxed{5} of old", "solution": "4", "teacher": "old"},
        {"prompt": "What is 3 + 3?", "completion": None, "solution": "6", "teacher": None},
    ]
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with TeacherServer(lambda body: Reply(f"\\boxed{{{2 * number(body)}}}")) as server:
        make(server, num_samples=1)
        assert server.asked() == ["What is 1 + 1?", "What is 2 + 2?", "What is 3 + 3?"]
    assert [(row["demonstrations"], row["teacher"]) for row in rows_of(tmp_path / "out")] == [
        (["\\boxed{2} of old", "\\boxed{2}"], ["old", "m0"]), (["\\boxed{4}"], ["m0"]), (["\\boxed{6}"], ["m0"]),
    ]  # fmt: skip
    assert [(line["teacher"], line["reason"]) for line in rejected_in(tmp_path / "out")] == [("old", "wrong")]
    assert "| old | 2 | 1 | 1 |" in (tmp_path / "out" / "README.md").read_text()


def test_what_is_solved_is_what_the_trainer_calls_solved(make, tmp_path):
    """Of several rewards the one that decides, by its own value; or their weighted total."""
    rewards = {"reward_funcs": [REWARD, "tests.teacher_server.letters_reward"], "num_samples": 1}
    with TeacherServer(lambda body: Reply(f"\\boxed{{{2 * number(body) + number(body) // 3}}}")) as server:
        make(server, **rewards, solved_reward="boxed_reward")
        assert [len(row["demonstrations"]) for row in rows_of(tmp_path / "out")] == [1, 1, 0, 0]
        assert "An answer is right if the reward `boxed_reward` is 1 or more" in (
            (tmp_path / "out" / "README.md").read_text()
        )
        make(server, **rewards, solved_reward="letters_reward", solved_threshold=0.5)
        assert [len(row["demonstrations"]) for row in rows_of(tmp_path / "out")] == [1, 1, 1, 1]
        # 1 or 0 from the box, 0.5 from the letters, times their weights
        for threshold, kept in ((2.25, [1, 1, 0, 0]), (0.25, [1, 1, 1, 1]), (2.5, [0, 0, 0, 0])):
            make(server, **rewards, solved_reward="total", reward_weights=[2, 0.5], solved_threshold=threshold)
            assert [len(row["demonstrations"]) for row in rows_of(tmp_path / "out")] == kept
        assert len(server.bodies) == 4


def test_what_the_teacher_filters_is_no_demonstration(make, tmp_path):
    kinds = {
        1: Reply("\\boxed{2}", finish="content_filter"),
        2: Reply(None, message={"refusal": "I will not."}),
        3: Reply(None, finish="tool_calls"),
        4: Reply("\\boxed{8}", finish=None, usage=None),
    }
    with TeacherServer(lambda body: kinds[number(body)]) as server:
        make(server, num_samples=1)
    lines = [(line["row"], line["reason"], line["detail"]) for line in rejected_in(tmp_path / "out")]
    assert lines == [
        (0, "filtered by the teacher", "content_filter"), (1, "filtered by the teacher", "content_filter"),
        (2, "filtered by the teacher", "tool_calls"),
    ]  # fmt: skip
    assert len(rows_of(tmp_path / "out")[3]["demonstrations"]) == 1


def test_hostile_answers_are_answers(make, tmp_path):
    said = {1: LONELY, 2: "\0\\boxed{4}", 3: "\\boxed{" * 5000, 4: '{"teacher": "m0"'}
    with TeacherServer(lambda body: Reply(f"{said[number(body)]} \\boxed{{{2 * number(body)}}}")) as server:
        make(server, num_samples=1, reward_funcs="math_reward_optional_thought", max_demonstrations=1)
    rows = rows_of(tmp_path / "out")
    assert rows[0]["completion"][0]["content"] == "\ufffd \\boxed{2}"
    assert rows[1]["completion"] is not None
    assert len(rows) == 4


# What is asked


def test_columns_prompts_and_limits(make, tmp_path, problems):
    rows = [{"q": f"What is {i} + {i}?", "gold": 2 * i, "level": "easy"} for i in (1, 2, 3)]
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with TeacherServer(right) as server:
        make(
            server, prompt_column="q", solution_column="gold", limit=2, num_samples=1, temperature=0.5, top_p=0.9,
            max_tokens=77, system_prompt="Be brief.", teacher_system_prompt="Be clever.",
            extra_body='{"top_k": 20, "seed": null}',
        )  # fmt: skip
        bodies = server.bodies
    assert [body["messages"] for body in bodies] == [
        [{"role": "system", "content": "Be clever."}, {"role": "user", "content": f"What is {i} + {i}?"}]
        for i in (1, 2)
    ]
    for body in bodies:
        rest = {name: value for name, value in body.items() if name != "messages"}
        assert rest == {"model": "m0", "temperature": 0.5, "top_p": 0.9, "max_tokens": 77, "top_k": 20}
    read = rows_of(tmp_path / "out")
    assert [(row["solution"], row["level"]) for row in read] == [("2", "easy"), ("4", "easy")]
    assert [message["content"] for message in read[0]["prompt"]] == ["Be brief.", "What is 1 + 1?"]


@pytest.mark.parametrize(
    ("columns", "flags", "solution"),
    [
        ({"problem": "P", "answer": "2", "solution": "One and one."}, {}, "2"),
        ({"problem": "P", "answer": "no", "solution": "2"}, {"solution_column": "solution"}, "2"),
        ({"question": "P", "final": 2}, {"solution_column": "final"}, "2"),
        ({"task": "P", "answer": "2"}, {"prompt_column": "task"}, "2"),
        ({"chat": [{"role": "user", "content": "P"}], "answer": "2"},
         {"prompt_column": "chat", "solution_column": "answer"}, "2"),
        ({"prompt": "P", "answer": "2"}, {"solution_column": "answer"}, "2"),
    ],
)  # fmt: skip
def test_where_problems_and_answers_are_found(make, tmp_path, problems, columns, flags, solution):
    problems.write_text(json.dumps(columns).replace('"P"', '"What is 1 + 1?"') + "\n")
    with TeacherServer(right) as server:
        make(server, num_samples=1, **flags)
        assert server.bodies[0]["messages"] == [{"role": "user", "content": "What is 1 + 1?"}]
    [row] = rows_of(tmp_path / "out")
    assert row["solution"] == solution
    assert len(row["demonstrations"]) == 1
    assert row["prompt"] == ("What is 1 + 1?" if "prompt" in columns else server.bodies[0]["messages"])


@pytest.mark.parametrize("flags", [{}, {"max_demonstrations": 1}])
def test_a_test_split_shares_no_problem_and_no_teacher_is_asked_for_it(make, problems, tmp_path, flags):
    words = "and this is a story of so many words that nobody would write it twice"
    rows = [{"question": f"What is {i} + {i}?" + f" {words}" * (i > 6), "answer": str(2 * i)} for i in range(1, 9)]
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with TeacherServer(right) as server:
        printed = make(server, num_samples=1, test_size=3, seed=1, **flags)
        asked = set(server.asked())
    splits = {name: list(split) for name, split in load_splits(str(tmp_path / "out"), "out").items()}
    texts = {name: [row["prompt"][0]["content"] for row in split] for name, split in splits.items()}
    assert (len(texts["train"]), len(texts["test"])) == (5, 3)
    assert set(texts["train"]) == asked
    assert set(texts["train"]) | set(texts["test"]) == {row["question"] for row in rows}
    long = [name for name, split in texts.items() for text in split if words in text]
    assert len(set(long)) == 1  # the two long ones are near-duplicates
    assert [row["solution"] for row in splits["test"]] == [
        str(2 * number({"messages": row["prompt"]})) for row in splits["test"]
    ]
    assert not any(row.get("demonstrations") or row.get("completion") for row in splits["test"])
    assert "5 rows are for training and 3 for testing" in printed
    assert "5 rows are for training and 3 for testing" in (tmp_path / "out" / "README.md").read_text()


def test_no_two_answers_have_the_same_seed_and_equal_questions_are_asked_once(make, problems, tmp_path):
    problems.write_text(problems.read_text() * 2)
    with TeacherServer(right) as server:
        make(server)
        assert len({body["seed"] for body in server.bodies}) == len(server.bodies) == 8
    rows = rows_of(tmp_path / "out")
    assert len(rows) == 8
    assert rows[0]["demonstrations"] == rows[4]["demonstrations"]


def test_no_more_requests_at_a_time_than_asked_for(make):
    with TeacherServer(right, pause=0.02) as server:
        make(server, num_samples=6, concurrency=3)
        assert 1 < server.most_at_once <= 3


# Servers that fail


@pytest.mark.parametrize(
    "fault",
    [{"status": 429, "headers": {"Retry-After": "0.3"}}, {"status": 503}, {"does": "drop"}, {"does": "half"},
     {"does": "hang"}],
    ids=["429", "503", "broken connection", "half an answer", "silence"],
)  # fmt: skip
def test_a_request_that_fails_is_sent_again(make, tmp_path, fault):
    sent = []

    def answer(body):
        sent.append(time.monotonic())
        return right(body)

    with TeacherServer(answer) as server:
        server.fault(**fault, after=3)
        began = time.monotonic()
        make(server, concurrency=1, timeout=0.5 if fault.get("does") == "hang" else 20)
        assert len(server.bodies) == 8 + 1
        # the same question, with the same seed
        assert Counter(Counter(body["seed"] for body in server.bodies).values()) == {1: 7, 2: 1}
    if "headers" in fault:
        assert sent[3] - sent[2] >= 0.3
        assert sent[-1] - began < 60
    assert all(len(row["demonstrations"]) == 2 for row in rows_of(tmp_path / "out"))


def test_questions_without_an_answer_are_counted_and_asked_again_by_the_next_run(make, tmp_path):
    with TeacherServer(right) as server:
        server.fault(does="garbage", after=2, times=1)
        server.fault(status=500, after=4, times=2)
        printed = make(server, max_retries=0, concurrency=1)
        assert "3 questions had no answer" in printed
        assert len(answers_in(tmp_path / "out")) == 5
        assert len(server.bodies) == 8
        printed = make(server, max_retries=0)
        assert len(server.bodies) == 11
    assert "5 of 8 answers are kept" in printed
    assert "had no answer" not in printed


def test_a_question_that_is_refused_for_good_is_kept_and_the_others_go_on(make, tmp_path):
    with TeacherServer(right) as server:
        server.fault(status=400, message=f"too long for the context, {LONELY}", times=None, about="What is 1")
        for _ in range(2):
            printed = make(server)
            assert len(server.bodies) == 8  # neither sent again nor asked again
    assert "question refused" in printed
    lines = [line for line in rejected_in(tmp_path / "out") if line["reason"] == "question refused"]
    assert [line["row"] for line in lines] == [0, 0]
    assert "status 400: " in lines[0]["detail"]
    assert "too long for the context" in lines[0]["detail"]
    assert [len(row["demonstrations"]) for row in rows_of(tmp_path / "out")] == [0, 2, 2, 2]


def test_a_server_that_refuses_everything_ends_it_and_nothing_is_kept(make, tmp_path, capsys):
    with TeacherServer(right) as server:
        server.fault(status=422, message="seed is not supported", times=None)
        said = refusal(lambda: make(server, num_samples=5, concurrency=2), capsys)
        assert len(server.bodies) <= 12
    assert "refuses every question, the last with status 422" in said
    assert "seed is not supported" in said
    assert answers_in(tmp_path / "out") == []


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_wrong_key_or_model_costs_one_request_and_ends_with_one_sentence(
    make, tmp_path, capsys, monkeypatch, status
):
    monkeypatch.setenv("MY_TEACHER", KEY)
    with TeacherServer(right) as server:
        server.fault(status=status, message=f"no, {KEY} is wrong", times=None)
        said = refusal(lambda: make(server, teacher_key_variable="MY_TEACHER", num_samples=9), capsys)
        assert server.keys == [KEY]
    assert said.startswith("luffy-trl make-demonstrations: error: the server of --teacher_model m0 refuses with ")
    assert f"status {status}: no, *** is wrong. Look at the key, the model's name and --teacher_url." in said
    assert KEY not in said


def test_keys_come_from_the_environment_and_are_written_nowhere(make, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with TeacherServer(right, key=KEY) as server:
        server.fault(status=400, message=f"the key {KEY} is right", after=1)
        printed = make(server)
    monkeypatch.setenv("OTHER", KEY[::-1])
    with TeacherServer(right, key=KEY) as first, TeacherServer(right, key=KEY[::-1]) as second:
        printed += make(first, second, output="two", teacher_key_variable=["OPENAI_API_KEY", "OTHER"])
    written = (printed + capsys.readouterr().err).encode()
    written += b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert KEY.encode() not in written
    assert KEY[::-1].encode() not in written
    assert b"the key *** is right" in written


def test_a_local_server_needs_no_key(make):
    with TeacherServer(right) as server:
        make(server)
        assert set(server.keys) == {"none"}


def test_a_server_that_is_gone_ends_the_run_which_goes_on_later(make, tmp_path, capsys):
    with TeacherServer(right) as server:
        server.fault(status=503, after=3, times=None)
        said = refusal(lambda: make(server, num_samples=8, max_retries=0, concurrency=1), capsys, STOPPED_STATUS)
        assert len(server.bodies) == 3 + 10
        assert "m0 does not answer (status 503: " in said
        assert "3 of 32 answers are kept" in said
        assert "The same command goes on from there" in said
        server.faults.clear()
        before = len(server.bodies)
        make(server, num_samples=8)
        assert len(server.bodies) == before + 29
    assert not any(path.name.startswith(".rejected") for path in (tmp_path / "out").iterdir())


def test_a_server_that_is_not_there_ends_it_at_the_first_question(make, capsys):
    with TeacherServer(right) as server:
        pass
    said = refusal(lambda: make(server, max_retries=0), capsys, STOPPED_STATUS)
    assert "The server of --teacher_model m0 does not answer" in said
    assert "0 of 8 answers are kept" in said


# Runs that go on


@pytest.mark.slow
def test_a_killed_run_goes_on_and_asks_for_nothing_twice(make, problems, tmp_path):
    output = tmp_path / "out"
    with TeacherServer(right, pause=0.05) as server:
        command = [
            *(
                sys.executable,
                "-m",
                "luffy_trl",
                "make-demonstrations",
                "--dataset_name",
                problems,
                "--num_samples",
                16,
            ),
            *("--teacher_url", server.url, "--teacher_model", "m0", "--reward_funcs", REWARD),
            *("--output_dir", output, "--concurrency", 3),
        ]

        path = os.pathsep.join(filter(None, sys.path))

        def run_until(wanted: int, how: signal.Signals) -> subprocess.Popen:
            process = subprocess.Popen(
                list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                cwd=Path(__file__).parents[1], env=os.environ | {"PYTHONPATH": path},
            )  # fmt: skip
            while process.poll() is None and len(answers_in(output)) < wanted:
                time.sleep(0.01)
            process.send_signal(how)
            process.out, process.err = process.communicate(timeout=HUNG)
            return process

        killed = run_until(10, signal.SIGKILL)
        assert killed.returncode == -signal.SIGKILL, killed.err
        with open(output / "_answers" / "m0.jsonl", "a") as file:
            file.write('{"teacher": "m0", "problem": "12')
        first = answers_in(output)
        asked_at_first = len(server.bodies)
        assert len(first) <= asked_at_first <= len(first) + 3  # those under way

        interrupted = run_until(len(first) + 10, signal.SIGINT)
        assert interrupted.returncode == 1, interrupted.err
        assert "Traceback" not in interrupted.err
        second = answers_in(output)
        assert f"Interrupted. {len(second)} of 64 answers are kept" in interrupted.err
        assert "half-written answers of a killed run are asked for again" in interrupted.out
        assert not (output / "data").exists()

        make(server, num_samples=16)
        assert len(server.bodies) <= 64 + 3 + 3
    answers = answers_in(output)
    assert len(answers) == len({(a["teacher"], a["problem"], a["repeat"]) for a in answers}) == 64
    assert answers[: len(second)] == second
    assert second[: len(first)] == first
    assert [len(row["demonstrations"]) for row in rows_of(output)] == [16] * 4


def test_what_changes_answers_is_refused_by_name_and_what_does_not_grades_anew(make, tmp_path, capsys):
    def answer(body):
        return Reply(f"\\boxed{{{2 * number(body) + body['seed'] % 2}}} {body['seed']}")

    with TeacherServer(answer) as server:
        make(server, num_samples=3)
        before = (tmp_path / "out" / "README.md").read_text()
        for flag, value in {"temperature": 0.7, "max_tokens": 5, "seed": 1, "system_prompt": "Hm."}.items():
            said = refusal(lambda: make(server, num_samples=3, **{flag: value}), capsys)  # noqa: B023
            assert re.search(rf"holds answers of m0 made with --{flag} \S+ instead of {value!r}", said)
        assert (tmp_path / "out" / "README.md").read_text() == before

        make(server, num_samples=3, select="shortest", temperature=1.0)
        assert "completion" in rows_of(tmp_path / "out")[0]
        make(server, num_samples=3, reward_funcs="tests.teacher_server.any_reward")
        assert [len(row["demonstrations"]) for row in rows_of(tmp_path / "out")] == [3] * 4
        make(server, num_samples=2, reward_funcs="tests.teacher_server.any_reward")
        assert [len(row["demonstrations"]) for row in rows_of(tmp_path / "out")] == [2] * 4
        assert len(server.bodies) == 12
        make(server, num_samples=5, reward_funcs="tests.teacher_server.any_reward")
        assert len(server.bodies) == 20
        assert len({body["seed"] for body in server.bodies}) == 20


def test_another_model_in_the_same_directory_is_refused(make, tmp_path, capsys, tiny_model_dir):
    shutil.copytree(tiny_model_dir, tmp_path / "teacher")
    flags = {"dataset_name": "letter_walk", "limit": 1, "teacher_model_name_or_path": tmp_path / "teacher",
             "reward_funcs": "tests.teacher_server.any_reward", "max_tokens": 3}  # fmt: skip
    make(**flags)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher")
    model.lm_head.weight.data += 1
    model.save_pretrained(tmp_path / "teacher")
    said = refusal(lambda: make(**flags), capsys)
    assert "holds answers of teacher made with other files in the model's directory than now" in said


def test_a_teacher_more_asks_only_itself(make, tmp_path):
    with TeacherServer(right) as first, TeacherServer(lambda body: Reply(f"\\boxed{{{2 * number(body)}}}")) as second:
        make(first)
        make(first, second, temperature=1.0)
        assert (len(first.bodies), len(second.bodies)) == (8, 8)
    assert rows_of(tmp_path / "out")[0]["teacher"] == ["m0", "m1", "m0"]  # m1's second answer is its first


def test_a_reward_that_fails_loses_no_answer(make, tmp_path, capsys):
    with TeacherServer(right) as server:
        said = refusal(lambda: make(server, reward_funcs="tests.teacher_server.broken_reward"), capsys)
        assert "row 0: --reward_funcs broken_reward: KeyError: 'no' All samples are kept" in said
        make(server)
        assert len(server.bodies) == 8


def test_damaged_answers_are_named(make, tmp_path, capsys):
    with TeacherServer(right) as server:
        make(server)
        path = tmp_path / "out" / "_answers" / "m0.jsonl"
        path.write_text(path.read_text().replace('"repeat": 1', '"repeat": "one"', 1))
        said = refusal(lambda: make(server), capsys)
        assert re.search(r"m0.jsonl, line \d is no answer \(`repeat` is 'one', expected a whole number", said)
        (tmp_path / "out" / "_answers" / "run.json").write_text("[]")
        path.write_text("".join(line for line in path.read_text().splitlines(keepends=True) if '"one"' not in line))
        assert "run.json, which says how they were made, cannot be read" in refusal(lambda: make(server), capsys)


# The student, and log-probs


@pytest.fixture(scope="module")
def chat_student(tmp_path_factory, chat_tokenizer) -> Path:
    """Random; byte by byte, with ChatML's template and its end of turn as EOS."""
    tokenizer = AutoTokenizer.from_pretrained(saved(chat_tokenizer, tmp_path_factory.mktemp("tokenizer")))
    tokenizer.chat_template, tokenizer.eos_token = CHATML, "<|im_end|>"
    return save_tiny_qwen2(
        tmp_path_factory.mktemp("student"), tokenizer, max_position_embeddings=512, initializer_range=0.2
    )


def saved(tokenizer, directory: Path) -> Path:
    tokenizer.save_pretrained(directory)
    return directory


def logps_by_hand(model_dir: Path, prompt_ids: list[int], ids: list[int]) -> list[float]:
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([prompt_ids + ids])).logits[0]
    logps = torch.log_softmax(logits, dim=-1)
    return [logps[len(prompt_ids) + i - 1, token].item() for i, token in enumerate(ids)]


def prompt_ids_by_hand(tokenizer, prompt) -> list[int]:
    return tokenizer(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False))["input_ids"]


def test_the_most_probable_under_the_student_is_kept(make, tmp_path, chat_student):
    with TeacherServer(right) as server:
        make(server, num_samples=4)
        make(server, num_samples=4, select="probable", student=chat_student)
        kept = [row["completion"] for row in rows_of(tmp_path / "out")]
        make(server, num_samples=4, select="all")
        assert len(server.bodies) == 16
    tokenizer = AutoTokenizer.from_pretrained(chat_student)
    for row, best in zip(rows_of(tmp_path / "out"), kept, strict=True):
        prompt_ids = prompt_ids_by_hand(tokenizer, row["prompt"])
        scores = []
        for one in row["demonstrations"]:
            ids = [*tokenizer(one[0]["content"])["input_ids"], tokenizer.eos_token_id]
            logps = logps_by_hand(chat_student, prompt_ids, ids)
            scores.append(sum(logps) / len(logps))
        assert best == row["demonstrations"][scores.index(max(scores))]


def test_answers_that_the_student_cannot_write_are_rejected(make, tmp_path, chat_student):
    said = {1: "<|im_end|> \\boxed{2}", 2: "\\boxed{4}", 3: "<think>\nno end \\boxed{6}", 4: "\\boxed{8}"}
    with TeacherServer(lambda body: Reply(said[number(body)])) as server:
        printed = make(server, num_samples=1, student=chat_student)
    lines = rejected_in(tmp_path / "out")
    assert [(line["row"], line["reason"]) for line in lines] == [(0, "not as the student writes")]
    assert "holds the end-of-sequence token '<|im_end|>' before its end" in lines[0]["detail"]
    assert "row 0, by m0: the answer holds the end-of-sequence token" in printed


def test_a_prompt_that_the_students_template_refuses_is_named_before_anything_is_asked(
    make, tmp_path, capsys, chat_student
):
    tokenizer = AutoTokenizer.from_pretrained(chat_student)
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    )
    for path in chat_student.iterdir():
        (tmp_path / "strict").mkdir(exist_ok=True)
        (tmp_path / "strict" / path.name).write_bytes(path.read_bytes())
    tokenizer.save_pretrained(tmp_path / "strict")
    with TeacherServer(right) as server:
        said = refusal(lambda: make(server, student=tmp_path / "strict", system_prompt="Think."), capsys)
        assert server.bodies == []
    assert "Row 0: `prompt` has a message with the role 'system', which is refused" in said


def joined(tokens: list[tuple], character: str) -> list[tuple]:
    """As vLLM spells the two bytes of a character: nothing, then all of it."""
    spelled = [("", []), (character, list(character.encode()))]
    return [*tokens[:3], *((*one, logp) for one, (_, _, logp) in zip(spelled, tokens[3:5], strict=True)), *tokens[5:]]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda tokens: tokens, None),
        (lambda tokens: joined(tokens, "é"), None),
        (lambda tokens: joined(tokens, "è"), "the server wrote other tokens"),
        (lambda tokens: [*tokens[:-1], ("", None, -0.5)], None),
        (lambda tokens: tokens[:-1], "the server gave none of the token that ends the answer"),
        (lambda tokens: [("It", None, -1.0), *tokens[2:]], "the server wrote other tokens"),
        (lambda tokens: [("J", None, -1.0), *tokens[1:]], "the server wrote other tokens"),
        (lambda tokens: [(t, b, 0.5) for t, b, _ in tokens], "not all of them are finite and at most 0"),
        (lambda tokens: [(t, b, float("nan")) for t, b, _ in tokens], "not all of them are finite and at most 0"),
        (lambda tokens: None, "the teacher gave none"),
    ],
)
def test_a_servers_log_probs_come_along_where_its_tokens_are_the_students(make, tmp_path, chat_student, change, why):
    def tokens_of(text):
        spelled = [bytes([byte]) for byte in text.encode()]
        tokens = [(b.decode(errors="replace"), list(b), -0.25 * i) for i, b in enumerate(spelled)]
        return [*tokens, ("<|im_end|>", list(b"<|im_end|>"), -0.5)]

    def answer(body):
        text = f"It é \\boxed{{{2 * number(body)}}}"
        return Reply(text, tokens=change(tokens_of(text)))

    with TeacherServer(answer) as server:
        printed = make(server, num_samples=1, student=chat_student, logprobs=True)
        assert all(body["logprobs"] is True for body in server.bodies)
    rows = rows_of(tmp_path / "out")
    if why is None:
        for row in rows:
            expected = [logp for _, _, logp in tokens_of(row["completion"][0]["content"])]
            assert row["completion_logps"] == expected
        assert "4 demonstrations have their teacher's log-probs." in printed
    else:
        assert "completion_logps" not in rows[0]
        assert f"0 demonstrations have their teacher's log-probs; left out were 4 because {why}." in printed


def test_a_transformers_teacher_answers_and_its_log_probs_are_the_students_own(make, tmp_path, tiny_model_dir, capsys):
    flags = {
        "dataset_name": "letter_walk", "limit": 8, "teacher_model_name_or_path": tiny_model_dir, "num_samples": 3,
        "max_tokens": 60, "batch_size": 5, "reward_funcs": "tests.teacher_server.any_reward", "seed": 3,
    }  # fmt: skip
    walks = [row.pop("completion") for row in list_of_walks(8, seed=3)]
    printed = make(**flags, student=tiny_model_dir, logprobs=True, select="shortest")
    assert "demonstrations have their teacher's log-probs" in printed
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    compared = 0
    for row, walk in zip(rows_of(tmp_path / "out"), walks, strict=True):
        if row["teacher"] == "dataset":
            assert row["completion"] == walk
            assert row["completion_logps"] is None
        else:
            ids = [*tokenizer(row["completion"])["input_ids"], tokenizer.eos_token_id]
            expected = logps_by_hand(tiny_model_dir, tokenizer(row["prompt"])["input_ids"], ids)
            assert row["completion_logps"] == pytest.approx(expected, abs=1e-4)
            compared += 1
    assert compared > 1
    answers = answers_in(tmp_path / "out")
    assert len(answers) == 24
    assert {a["finish"] for a in answers} == {"stop", "length"}
    assert all(a["completion_tokens"] == 60 for a in answers if a["finish"] == "length")
    again = make(**flags, select="shortest")
    assert "24 of 24 answers are kept" in again

    # the same command in another place: the same answers
    make(**flags, output="again", logprobs=True, student=tiny_model_dir)
    assert answers_in(tmp_path / "again") == answers


def test_servers_and_models_of_this_process_are_teachers_side_by_side(make, tmp_path, tiny_model_dir, chat_student):
    with TeacherServer(lambda body: Reply("a#a")) as server:
        make(
            server, dataset_name="letter_walk", limit=3, reward_funcs="tests.teacher_server.any_reward", max_tokens=4,
            teacher_model_name_or_path=[tiny_model_dir, chat_student], num_samples=2, batch_size=4,
        )  # fmt: skip
        assert len(server.bodies) == 6
        assert all(len(body["messages"]) == 1 for body in server.bodies)  # a text is the user's message
    names = Counter(answer["teacher"] for answer in answers_in(tmp_path / "out"))
    assert names == {"m0": 6, tiny_model_dir.name: 6, chat_student.name: 6}
    assert [row["teacher"][:2] for row in rows_of(tmp_path / "out")] == [["dataset", "m0"]] * 3


def list_of_walks(count: int, seed: int) -> list[dict]:
    from luffy_trl.tasks.letter_walk import split_walks, to_dataset

    return list(to_dataset(split_walks(seed=seed)["train"][:count]))


def test_a_problem_that_fills_the_teachers_window_is_refused_for_good(make, tmp_path, chat_student, problems):
    rows = [{"prompt": [{"role": "user", "content": text}], "solution": "1"} for text in ("x" * 600, "short")]
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    printed = make(teacher_model_name_or_path=chat_student, num_samples=1, max_tokens=4)
    reasons = {line["row"]: (line["reason"], line["detail"]) for line in rejected_in(tmp_path / "out")}
    assert reasons[0][0] == "question refused"
    assert "leave nothing of the model's window of 512" in reasons[0][1]
    assert reasons[1] == ("unfinished", "4 tokens")
    assert "0 of 2 problems have a demonstration" in printed


# Training on it


CPU = [
    *("--max_steps", "2", "--num_generations", "4", "--per_device_train_batch_size", "4"),
    *("--gradient_accumulation_steps", "1", "--logging_steps", "1", "--use_cpu", "--bf16", "False"),
    *("--report_to", "none", "--max_completion_length", "64", "--save_strategy", "no"),
    *("--gradient_checkpointing", "False", "--shuffle_dataset", "False", "--learning_rate", "1e-6"),
]


def train(dataset: Path, model: Path, output: Path) -> dict:
    """Two steps of `luffy-trl train`; the last line of its log."""
    main([
        *("train", "--model_name_or_path", str(model), "--dataset_name", str(dataset), "--output_dir", str(output)),
        *("--reward_funcs", "tests.teacher_server.any_reward", *CPU),
    ])  # fmt: skip
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return next(line for line in log if "off_policy/ratio" in line)


def test_the_output_trains_with_the_teachers_log_probs(make, tmp_path, tiny_model_dir):
    dataset = tmp_path / "walks.jsonl"
    rows = [{name: row[name] for name in ("prompt", "solution")} for row in list_of_walks(12, seed=0)]
    dataset.write_text("".join(json.dumps(row) + "\n" for row in rows))
    make(
        dataset_name=dataset, teacher_model_name_or_path=tiny_model_dir, student=tiny_model_dir, logprobs=True,
        reward_funcs="tests.teacher_server.any_reward", max_tokens=60, num_samples=8,
    )  # fmt: skip
    assert sum(row["completion_logps"] is not None for row in rows_of(tmp_path / "out")) > 3
    logged = train(tmp_path / "out", tiny_model_dir, tmp_path / "run")
    assert logged["off_policy/ratio"] == pytest.approx(1.0, abs=1e-3)  # the teacher is the policy


def test_the_output_trains_without_log_probs(make, tmp_path, chat_student):
    with TeacherServer(right) as server:
        make(server, student=chat_student)
    logged = train(tmp_path / "out", chat_student, tmp_path / "run")
    assert 0 < logged["off_policy/ratio"] < 1
    assert logged["off_policy/token_fraction"] > 0


# The pages


ROOT = Path(__file__).parents[1]
COMMAND = re.compile(r"^luffy-trl (make-demonstrations|train) (.*)$", flags=re.MULTILINE)


def commands_on(page: Path) -> list[tuple[str, list[str]]]:
    """The commands of a page's examples, with their arguments."""
    examples = re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.DOTALL)
    text = "\n".join(examples).replace("\\\n", " ")
    return [(name, shlex.split(arguments)) for name, arguments in COMMAND.findall(text)]


def test_the_pages_commands_run_as_printed(tmp_path, chat_student, monkeypatch):
    """But for the server's address, a tiny model, the CPU and fewer steps."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "problems.csv").write_text("question,answer\nWhat is 1 + 1?,2\n" + "What is 2 + 2?,4\n" * 3)
    [first, second, *_] = commands_on(ROOT / "docs" / "demonstrations.md")
    assert (first[0], second[0]) == ("make-demonstrations", "train")
    with TeacherServer(right) as server:
        replaced = {"http://localhost:8000/v1": server.url, "Qwen/Qwen2.5-1.5B-Instruct": str(chat_student)}
        for name, arguments in (first, second):
            arguments = [replaced.get(argument, argument) for argument in arguments]
            main([name, *arguments, *(CPU if name == "train" else [])])
        assert len(server.bodies) == 2 * 4
        assert {body["model"] for body in server.bodies} == {"Qwen/Qwen3-32B"}
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert [len(row["demonstrations"]) for row in rows_of(tmp_path / "demonstrations")] == [4] * 4


def test_the_pages_other_commands_have_flags_that_exist():
    commands = [arguments for name, arguments in commands_on(ROOT / "docs" / "demonstrations.md") if name != "train"]
    assert len(commands) == 3
    for arguments in commands:
        build_parser("luffy-trl make-demonstrations").parse_args(arguments)


def test_the_page_names_every_reason():
    page = (ROOT / "docs" / "demonstrations.md").read_text()
    assert [reason for reason in Rejection if reason not in page] == []


# Refusals and the Hub


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"teacher_model": ["a", "b"]}, "--teacher_url and --teacher_model go together"),
        ({"teacher_url": "localhost:8000"}, "--teacher_url localhost:8000: expected an address such as http://"),
        ({"teacher_url": "http://localhost:99999/v1"}, "expected an address such as http://"),
        ({"teacher_key_variable": "NO_SUCH_VARIABLE"}, "--teacher_key_variable NO_SUCH_VARIABLE: there is no such"),
        ({"temperature": 0}, "--temperature 0 gives the same answer each time"),
        ({"top_p": 0}, "--top_p 0.0 must be above 0"),
        ({"timeout": "nan"}, "--timeout nan must be a number of seconds"),
        ({"extra_body": "[1]"}, "must be a JSON object"),
        ({"select": "probable"}, "--select probable needs --student"),
        ({"logprobs": True}, "--logprobs needs --student"),
        ({"student": "no/such/model"}, "--student no/such/model"),
        ({"reward_funcs": "nothing"}, "--reward_funcs nothing: no such reward function"),
        ({"solved_reward": "other"}, "solved_reward='other' is not the name of a reward function"),
        ({"reward_weights": [1, 2]}, "--reward_weights has 2 weights for 1 reward functions"),
        ({"reward_funcs": ["format_reward", REWARD]}, "--solved_reward is missing"),
        ({"reward_funcs": "tests.teacher_server.token_reward"}, "reads `completion_ids`, token ids: give --student"),
        ({"dataset_name": "missing.jsonl"}, "--dataset_name missing.jsonl: there is no such file"),
        ({"dataset_split": "test"}, "has no split 'test', only 'train'. Choose with --dataset_split"),
        ({"prompt_column": "q"}, "--prompt_column q: --dataset_name"),
        ({"public": True}, "--public is about the repository of --push_to_hub"),
        ({"teacher_backend": "vllm", "teacher_model_name_or_path": "m"}, "pip install 'luffy_trl[vllm]'"),
    ],
)
def test_what_cannot_work_is_one_sentence_before_anything_is_asked(make, capsys, flags, sentence):
    with TeacherServer(right) as server:
        assert sentence in refusal(lambda: make(server, **flags), capsys)
        assert server.bodies == []


def test_a_missing_client_is_one_sentence(make, capsys, monkeypatch):
    monkeypatch.setattr("luffy_trl.commands.teachers.find_spec", lambda name: None)
    with TeacherServer(right) as server:
        said = refusal(lambda: make(server), capsys)
    assert "--teacher_url needs the openai client: pip install 'luffy_trl[teacher]'" in said


def test_a_launcher_of_several_processes_is_refused(make, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with TeacherServer(right) as server:
        assert "it runs in one process: start it without a launcher" in refusal(lambda: make(server), capsys)
        assert server.bodies == []


def test_a_second_run_in_the_directory_is_refused(make, tmp_path, capsys):
    with TeacherServer(right) as server, alone_in(tmp_path / "out"):
        assert "is in use: another run is writing to it" in refusal(lambda: make(server), capsys)
        assert server.bodies == []


def test_two_teachers_of_one_name_are_refused(make, capsys, tiny_model_dir):
    with TeacherServer(right) as server:
        said = refusal(lambda: make(server, teacher_url=[server.url] * 2, teacher_model=["a/b", "a-b"]), capsys)
    assert "two teachers are called a-b, and answers are kept by name" in said


def test_what_make_demonstrations_did_not_write_is_not_touched(make, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with TeacherServer(right) as server:
        said = refusal(lambda: make(server), capsys)
    assert "holds thesis.txt, which make-demonstrations did not write" in said
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_the_dataset_is_pushed_and_answers_stay_here(make, tmp_path, monkeypatch):
    with HubServer() as hub, TeacherServer(right) as server:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        printed = make(server, push_to_hub="tester/made")
        [repo] = hub.repos.values()
    assert "Pushed to" in printed
    assert {path for path in repo.at() if path != ".gitattributes"} == {"README.md", "data/train-00000.parquet"}
