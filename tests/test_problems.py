"""Tables of problems and gold answers are read as the data contract, whatever file they are in."""

import csv
import json

import pytest

from luffy_trl.data.contract import to_contract
from luffy_trl.data.loading import load_splits
from luffy_trl.data.problems import recognise_problems
from luffy_trl.data.rows import checked_rows


def read(path, streaming=False):
    dataset = load_splits(str(path), "mine", streaming=streaming)["train"]
    return list(checked_rows(to_contract(dataset, "mine"), "mine"))


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("question", "answer"), [("question", "answer"), ("problem", "answer"), ("question", "solution")]
)
def test_the_question_is_the_users_message_and_the_answer_its_gold(tmp_path, question, answer, streaming):
    path = write_lines(tmp_path / "a.jsonl", [{question: "1 + 1?", answer: "2", "level": 3}])
    row = {"prompt": [{"role": "user", "content": "1 + 1?"}], "solution": "2", "level": 3}
    assert read(path, streaming) == [row]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_csv_of_numbers_keeps_their_digits(tmp_path, streaming):
    path = tmp_path / "a.csv"
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([["question", "answer"], ["1 / 8?", "0.125"], ["2 * 50?", "100"]])
    assert [row["solution"] for row in read(path, streaming)] == ["0.125", "100"]


def test_beside_an_answer_a_solution_is_the_working(tmp_path, capsys):
    path = write_lines(tmp_path / "a.jsonl", [{"problem": "1 + 1?", "solution": "It is 2.", "answer": 2}])
    [row] = read(path)
    assert (row["solution"], row["worked_solution"]) == ("2", "It is 2.")
    assert "`solution` as worked_solution" in capsys.readouterr().out


@pytest.mark.parametrize(
    "columns", [["prompt", "question", "answer"], ["question", "problem", "answer"], ["question"]]
)
def test_other_tables_stay_as_they_are(columns):
    assert recognise_problems(columns) is None


@pytest.mark.parametrize("streaming", [False, True])
def test_a_problem_that_is_no_text_is_named_by_row(tmp_path, streaming):
    path = write_lines(tmp_path / "a.jsonl", [{"question": "1?", "answer": "1"}, {"question": " ", "answer": "1"}])
    with pytest.raises(ValueError, match=r"mine, row 1: `question` is .*, expected a text"):
        read(path, streaming)
