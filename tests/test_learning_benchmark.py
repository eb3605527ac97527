"""The learning benchmark: its variants of the data, its second task, its numbers, and that it runs and goes on."""

import json
import random
import subprocess
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest
from free_order import FreeOrderWalk, sample_free_order_walk
from variants import demonstrate

from luffy_trl.tasks.letter_walk import LETTERS, answered, letter_walk_reward, split_walks
from luffy_trl.tasks.letter_walk_base import PretrainingRows


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def benchmark_script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import learning

    return learning


def rewards(dataset) -> list[float]:
    rows = [row for row in dataset if row["completion"] is not None]
    return letter_walk_reward([row["completion"] for row in rows], [row["solution"] for row in rows])


def test_the_share_of_faulty_demonstrations_earns_no_reward():
    walks = split_walks(train_size=200)["train"]
    assert rewards(demonstrate(walks)) == [1.0] * 200
    faulty = demonstrate(walks, faulty=0.6, seed=1)
    assert Counter(rewards(faulty)) == {0.0: 120, 1.0: 80}
    wrong = rewards(faulty).index(0.0)
    assert faulty[wrong]["completion"] == answered(walks[wrong].steps()[:-1])


def test_faulty_demonstrations_can_be_dropped_and_the_others_stay_as_they_are():
    walks = split_walks(train_size=200)["train"]
    kept = demonstrate(walks, faulty=0.6, dropped=True, seed=1)
    assert len(kept) == 200
    assert rewards(kept) == [1.0] * 80
    whole = demonstrate(walks, faulty=0.6, seed=1)
    assert all(a is None or a == b for a, b in zip(kept["completion"], whole["completion"], strict=True))


def test_few_are_demonstrated_and_all_of_them_stay_in_the_data():
    walks = split_walks(train_size=200)["train"]
    few = demonstrate(walks, demonstrated=0.05)
    assert len(few) == 200
    assert rewards(few) == [1.0] * 10
    assert Counter(rewards(demonstrate(walks, demonstrated=0.5, faulty=0.3))) == {0.0: 30, 1.0: 70}


def test_doubled_demonstrations_are_longer_and_right():
    walk = split_walks(train_size=1)["train"][0]
    (row,) = demonstrate([walk], style="doubled")
    assert row["completion"] == ";".join(letter + ";" + letter for letter in walk.letters) + "#" + walk.answer
    assert rewards(demonstrate([walk], style="doubled")) == [1.0]
    with pytest.raises(ValueError, match="style='long' is not one of 'plain', 'doubled'"):
        demonstrate([walk], style="long")


def test_a_walk_in_free_order_has_many_right_answers():
    walk = FreeOrderWalk("k", (4, -5, 1, 9))
    assert walk.demonstration == "k;1o;2j;3k;4t#t"
    assert len(walk.sound_answers()) == 24
    assert "k;4t;2o;3p;1t#t" in walk.sound_answers()
    assert {answered(walk.steps(random.Random(seed))) for seed in range(200)} == walk.sound_answers()
    assert letter_walk_reward(sorted(walk.sound_answers()), [walk.answer] * 24) == [1.0] * 24


def test_stopping_early_is_wrong_in_every_order():
    rng = random.Random(0)
    for walk in (sample_free_order_walk(rng, 5) for _ in range(100)):
        for size in range(len(walk.shifts)):
            for part in combinations(walk.shifts, size):
                reached = LETTERS[(LETTERS.index(walk.start) + sum(part)) % 26]
                assert letter_walk_reward([f"#{reached}"], [walk.answer]) == [0.0]


def test_diligent_rows_go_on_as_often_as_asked(tokenizer):
    def steps_taken(diligence: float) -> Counter:
        rows = iter(PretrainingRows(tokenizer, 0, diligence=diligence))
        targets = []
        while len(targets) < 1000:
            row = next(rows)
            text = tokenizer.decode(row["input_ids"])
            target = tokenizer.decode([label for label in row["labels"] if label >= 0])
            if text.startswith("D"):
                assert text[:15] + text[15:].split("#")[0] in text
                targets.append(target.count(";"))
        return Counter(targets)

    assert steps_taken(0.0) == {0: 1000}
    assert 0.2 < 1 - steps_taken(0.3)[0] / 1000 < 0.4


def test_pass_at_k_is_the_chance_of_a_draw_without_replacement(benchmark_script):
    assert benchmark_script.pass_at_k(0, 8) == 0.0
    assert benchmark_script.pass_at_k(1, 8) == pytest.approx(8 / 16)
    assert benchmark_script.pass_at_k(2, 8) == pytest.approx(1 - (8 * 7) / (16 * 15))
    assert benchmark_script.pass_at_k(9, 8) == 1.0


def test_the_learning_rate_is_the_smallest_as_good_as_the_best_and_the_middle_one_if_none_is(benchmark_script):
    def run(method: str, rate: float, right: float) -> dict:
        return {
            "condition": "validation: letter walk", "task": "letter walk", "method": method, "seed": 7,
            "learning_rate": rate,
            "sampled": {"5": {"right": right}},
        }  # fmt: skip

    shares = {
        "GRPO": [(0.0, 0.0), (0.0, 0.0), (0.0, 0.0)],
        "SFT": [(0.98, 0.96), (0.99, 0.98), (1.0, 0.98)],  # 0.97, 0.985, 0.99
        "LUFFY": [(0.1, 0.3), (0.5, 0.3), (1.0, 0.0)],  # 0.2, 0.4, 0.5
    }
    runs = [
        run(method, rate, right)
        for method, by_rate in shares.items()
        for rate, seeds in zip(benchmark_script.LEARNING_RATES, by_rate, strict=True)
        for right in seeds
    ]
    rates = benchmark_script.chosen_rates({str(i): run for i, run in enumerate(runs)})
    assert rates == {("letter walk", "GRPO"): 1e-4, ("letter walk", "SFT"): 1e-4, ("letter walk", "LUFFY"): 3e-4}


def test_no_two_runs_share_a_key(benchmark_script):
    runs = benchmark_script.grid()
    assert len({run.key for run in runs}) == len(runs)
    assert not any(run.seed in benchmark_script.SEEDS for run in runs if run.condition.startswith("validation"))


def test_tables_show_what_was_measured_and_name_what_was_not(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from learning_report import cell, markdown

    assert cell([0.5, 0.25, 0.75]) == "0.500 (0.250 to 0.750)"
    assert cell([1.0, 1.0]) == "1.000"
    assert cell([20.0, float("inf")], ".0f") == "20 to never (1 of 2)"
    text = markdown(
        {
            "dates": ["d", "e", "f"], "device": "c", "versions": {"trl": "1"}, "steps": 2, "runs": [],
            "missing": ["clean | LUFFY |  | seed 0", "clean | SFT |  | seed 0"],
        }
    )  # fmt: skip
    assert "Measured d to f on c;" in text
    assert "**Not measured**: clean (2 runs)." in text


@pytest.mark.slow
def test_the_benchmark_runs_and_goes_on_where_it_stopped(tmp_path, tiny_model_dir):
    docs = tmp_path / "docs"
    docs.mkdir()
    page = BENCHMARKS.parent / "docs" / "learning.md"
    (docs / "learning.md").write_text(page.read_text())
    readme = tmp_path / "README.md"
    readme.write_text((BENCHMARKS.parent / "README.md").read_text())
    for seed in (0, 7, 8, 9):  # untrained bases: nobody waits for pretraining
        (tmp_path / "bases").mkdir(exist_ok=True)
        (tmp_path / "bases" / f"letter-walk-0-seed{seed}").symlink_to(tiny_model_dir)
    command = [
        sys.executable, BENCHMARKS / "learning.py", "--output", tmp_path / "out.json", "--bases", tmp_path / "bases",
        "--log", tmp_path / "runs.jsonl",
        "--docs", docs, "--readme", readme, "--steps", "2", "--seeds", "0", "--test_size", "8", "--workers", "1",
        "--learning_rates", "1e-4",
        "--conditions", "clean", "--methods", "LUFFY", "SFT",
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, text=True)

    results = json.loads((tmp_path / "out.json").read_text())
    assert results["missing"] == []
    assert [(run["condition"], run["method"]) for run in results["runs"][-2:]] == [
        ("clean", "LUFFY"),
        ("clean", "SFT"),
    ]
    assert len(results["runs"]) == 2 * 3 + 2
    luffy = results["runs"][-2]
    assert luffy["curves"]["step"] == [0, 2]
    assert luffy["generated_tokens"] > 0
    assert "### Clean" in (docs / "learning.md").read_text()
    assert f"| LUFFY | {luffy['sampled']['5']['right']:.2f} |" in readme.read_text()
    assert "| LUFFY | " in (docs / "learning.md").read_text()
    assert (docs / "learning_zero_reward.png").stat().st_size < 200_000

    # a line that is there is not run again
    log = tmp_path / "runs.jsonl"
    lines = log.read_text().splitlines()
    log.write_text("\n".join(lines[:-1]) + "\n")
    again = subprocess.run(command, check=True, capture_output=True, text=True)
    assert again.stdout.count(" of 8 ") == 1
