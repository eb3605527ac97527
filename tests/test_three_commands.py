"""The three commands of the README and of the quickstart: from problems alone to an evaluated model."""

import json
import re
import shlex
from pathlib import Path

import pytest

from luffy_trl.commands.cli import main
from luffy_trl.data.loading import load_splits

from .teacher_server import Reply, TeacherServer


ROOT = Path(__file__).parents[1]
PROBLEMS = 12
# In place of what a GPU, a real model and an hour are for
SMALL = {
    "make-demonstrations": "--test_size 4",
    "train": "--use_cpu --bf16 False --max_steps 2 --max_completion_length 64 --num_generations 4 --report_to none "
    "--per_device_train_batch_size 8 --learning_rate 1e-3 --logging_steps 1",
    "eval": "--device cpu --max_new_tokens 8",
}


def three_commands(page: Path) -> list[list[str]]:
    [block] = re.findall(r"```bash\n(luffy-trl make-demonstrations [^`]*\nluffy-trl train [^`]*)```", page.read_text())
    return [shlex.split(line)[1:] for line in block.replace("\\\n", " ").strip().split("\n")]


def teach(body: dict) -> Reply:
    """A teacher that is wrong on odd problems, half the time, and always on the last."""
    text = body["messages"][-1]["content"]
    n = int(re.findall(r"\d+", text)[0])
    wrong = n == PROBLEMS or (n % 2 == 1 and body["seed"] % 2 == 1)
    return Reply(f"{n} + {n} = {2 * n + wrong}. It is \\boxed{{{2 * n + wrong}}}.")


@pytest.fixture(scope="module")
def student(tmp_path_factory, chat_model_dir) -> Path:
    directory = tmp_path_factory.mktemp("student") / "model"
    main(f"prepare-model --model_name_or_path {chat_model_dir} --output_dir {directory} --template chatml".split())
    return directory


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_the_commands_are_the_same_on_both_pages(page):
    commands = three_commands(ROOT / page)
    assert commands == three_commands(ROOT / "README.md")
    assert [command[0] for command in commands] == ["make-demonstrations", "train", "eval"]


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_from_problems_alone_to_a_trained_and_evaluated_model(tmp_path, student, monkeypatch, ending):
    """As printed, but for the server's address, a tiny model, the CPU, fewer steps and problems."""
    monkeypatch.chdir(tmp_path)
    table = [(f"What is {n} + {n}?", 2 * n) for n in range(1, PROBLEMS + 1)]
    if ending == "csv":
        lines = ["question,answer", *(f"{question},{answer}" for question, answer in table)]
    else:
        lines = [json.dumps({"problem": question, "solution": str(answer)}) for question, answer in table]
    (tmp_path / f"problems.{ending}").write_text("\n".join(lines) + "\n")
    with TeacherServer(teach) as server:
        for command in three_commands(ROOT / "README.md"):
            replaced = {
                "http://localhost:8000/v1": server.url,
                "Qwen/Qwen2.5-1.5B-Instruct": str(student),
                "problems.csv": f"problems.{ending}",
            }
            main([*(replaced.get(part, part) for part in command), *SMALL[command[0]].split()])
        asked = {body["messages"][-1]["content"] for body in server.bodies}

    splits = load_splits("demonstrations", "")
    train, test = ({row["prompt"][-1]["content"]: row for row in splits[name]} for name in ("train", "test"))
    assert (len(train), len(test)) == (PROBLEMS - 4, 4)
    assert not asked & set(test)  # what is put aside costs nothing
    for question, row in train.items():
        n = int(re.findall(r"\d+", question)[0])
        assert row["solution"] == str(2 * n)
        completion = row["completion"]
        assert completion is None or completion[0]["content"].endswith(f"\\boxed{{{2 * n}}}.")
        assert completion is not None or n == PROBLEMS or n % 2 == 1
    assert sum(row["completion"] is not None for row in train.values()) >= 4

    [checkpoint] = (tmp_path / "out" / "mine").glob("checkpoint-*")
    logs = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    assert logs[0]["off_policy/reward"] == 1
    [summary] = json.loads((tmp_path / "evals" / "mine" / "results.json").read_text())["tasks"].values()
    assert summary["problems"] == 4
    samples = [path.read_text().splitlines() for path in (tmp_path / "evals" / "mine" / "samples").glob("*.jsonl")]
    assert summary["score"] == sum(json.loads(line)["score"] for line in samples[0]) / 4
