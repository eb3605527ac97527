"""A test split that shares no problem with the training split, in its sizes, its seeds and its near-duplicates."""

import json
import random
import re
from itertools import combinations

import datasets
import pandas as pd
import pytest

from luffy_trl.commands.cli import main
from luffy_trl.data.filters import problem_key, word_ngrams
from luffy_trl.data.loading import load_splits
from luffy_trl.data.splitting import split_problems


def alone(i: int) -> str:
    return f"What is {i} plus {i}?"


def alike(i: int, variant: int) -> str:
    """Of 13 words in a row that are the same for each variant."""
    return f"Variant {variant}: " + " ".join(f"word{i}x{k}" for k in range(13))


def overlap(one: str, other: str, ngram_size: int) -> bool:
    return problem_key(one) == problem_key(other) or bool(
        set(word_ngrams(one, ngram_size)) & set(word_ngrams(other, ngram_size))
    )


def shares_nothing(texts: list[str], test: frozenset[int], ngram_size: int = 13) -> bool:
    """By comparing all pairs."""
    train = [text for row, text in enumerate(texts) if row not in test]
    return not any(overlap(texts[row], text, ngram_size) for row in test for text in train)


def test_no_near_duplicate_is_on_the_other_side_and_the_size_is_met():
    rng = random.Random(0)
    texts = [alone(i) for i in range(40)] + [alike(i, v) for i in range(10) for v in range(3)]
    texts += [alone(i).upper() + " " for i in range(10)]  # the same but for case and spaces
    rng.shuffle(texts)
    assert not shares_nothing(texts, frozenset(range(20)))  # the check can fail
    for seed in range(5):
        split = split_problems(texts, 20, seed)
        assert len(split.test) == 20
        assert shares_nothing(texts, split.test)
        assert split.test == split_problems(texts, 20, seed).test
    assert split.test != split_problems(texts, 20, 0).test
    assert (split.rows, split.clustered, split.clusters, split.largest) == (80, 50, 20, 3)
    assert "60 rows are for training and 20 for testing; 50 rows are near-duplicates of others, in 20" in split.says()
    assert len(split_problems(texts, 0.25).test) == 20


def test_near_duplicates_of_near_duplicates_stay_together():
    words = [f"w{i}" for i in range(60)]
    chain = [" ".join(words[i : i + 20]) for i in range(0, 41, 5)]  # each shares 15 words with the next
    assert not overlap(chain[0], chain[-1], 13)
    split = split_problems([*chain, *map(alone, range(9))], 5)
    assert split.test.isdisjoint(range(9))
    assert (split.clusters, split.largest) == (1, 9)
    assert split_problems([*chain, *map(alone, range(9))], 5, ngram_size=0).clusters == 0


@pytest.mark.parametrize("seed", range(6))
def test_the_size_is_as_near_as_clusters_allow(seed):
    """Against every choice of clusters."""
    rng = random.Random(seed)
    sizes = [rng.choice([1, 3, 4, 7]) for _ in range(6)]
    sizes = [size for size in sizes if size > 1] + [1] * (seed % 2)
    texts = [alike(i, v) for i, size in enumerate(sizes) for v in range(size)]
    possible = {sum(chosen) for k in range(1, len(sizes)) for chosen in combinations(sizes, k)}
    for wanted in range(1, len(texts)):
        split = split_problems(texts, wanted, seed)
        assert abs(len(split.test) - wanted) == min(abs(size - wanted) for size in possible)
        assert shares_nothing(texts, split.test)


def test_what_cannot_be_parted_is_refused():
    with pytest.raises(ValueError, match=r"--test_size 3: only 3 rows are left, and some must stay for training"):
        split_problems(map(alone, range(3)), 3)
    with pytest.raises(ValueError, match=r"--test_size 1: all 4 rows are near-duplicates of one another"):
        split_problems([alike(0, v) for v in range(4)], 1)


@pytest.mark.shared_data
def test_real_problems_share_nothing(shared_data):
    texts = [p[1]["content"] for p in pd.read_parquet(shared_data / "math_benchmarks.parquet")["prompt"]][:500]
    split = split_problems(texts, 50)
    assert len(split.test) == 50
    assert shares_nothing(texts, split.test)


# The whole command


def rows_of(directory, split: str) -> list[dict]:
    return list(datasets.load_dataset(str(directory), split=split))


def test_a_table_of_questions_becomes_two_splits(tmp_path, capsys):
    lines = [f"{alone(i)},{2 * i}" for i in range(20)] + [
        f"{alone(0).lower()},0",
        f"{alike(1, 0)},1",
        f"{alike(1, 1)},2",
    ]
    (tmp_path / "mine.csv").write_text("\n".join(["question,answer", *lines]))
    command = ["prepare-data", str(tmp_path / "mine.csv"), "--output_dir", str(tmp_path / "out"), "--no_length"]
    command.append("--keep_without_demonstration")
    main([*command, "--test_size", "5"])
    printed = capsys.readouterr().out
    train, test = rows_of(tmp_path / "out", "train"), rows_of(tmp_path / "out", "test")
    assert (len(train), len(test)) == (17, 5)
    assert {row["completion"] for row in train + test} == {None}
    assert {row["prompt"][0]["content"] for row in train}.isdisjoint({row["prompt"][0]["content"] for row in test})
    assert {(row["prompt"][0]["content"], row["solution"]) for row in train + test} == {
        (line.rsplit(",", 1)[0], line.rsplit(",", 1)[1]) for line in lines if line != f"{alone(0).lower()},0"
    }
    assert "17 rows are for training and 5 for testing; 2 rows are near-duplicates of others, in 1 clusters" in printed
    assert "no demonstration: not checked, --keep_without_demonstration" in printed
    assert f"train.py --num_demonstrations 0 --dataset_name {tmp_path / 'out'}" in printed
    assert f"luffy-trl eval --dataset_name {tmp_path / 'out'} --reward_funcs math_reward_optional_thought" in printed
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| for testing (`test`) | 5 | - |" in card
    assert "--test_size 5" in card

    assert set(load_splits(str(tmp_path / "out"), "out")) == {"train", "test"}  # as train and eval read it

    main([*command, "--overwrite"])
    assert set(datasets.load_dataset(str(tmp_path / "out"))) == {"train"}


def test_problems_without_a_demonstration_stay_where_they_are_asked_for(tmp_path, capsys):
    def row(problem: str, completion: str | None, solution: str = "2") -> dict:
        return {"prompt": problem, "completion": completion, "solution": solution}

    rows = [
        row("a?", None), row("b?", "It is \\boxed{3}."), row("c?", "It is \\boxed{2}."), row("d?", None, "{"),
        row("A?", "It is \\boxed{2}."), row("a?", None), row("e?", ""),
    ]  # fmt: skip
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = ["prepare-data", str(tmp_path / "mine.jsonl"), "--output_dir", str(tmp_path / "out"), "--no_length"]
    main([*command, "--keep_without_demonstration"])
    kept = [(r["prompt"], r["completion"]) for r in rows_of(tmp_path / "out", "train")]
    good = "It is \\boxed{2}."
    # of two copies the one with a demonstration, and those without come last
    assert kept == [("c?", good), ("A?", good), ("b?", None), ("e?", None)]
    dropped = [json.loads(line) for line in (tmp_path / "out" / "dropped.jsonl").read_text().splitlines()]
    assert [(d["row"], d["reason"]) for d in dropped] == [
        (3, "gold answer unreadable"), (0, "duplicate"), (5, "duplicate"),
    ]  # fmt: skip
    printed = capsys.readouterr().out
    assert re.search(r"kept without a demonstration +2 ", printed)
    main([*command, "--overwrite"])
    assert [r["prompt"] for r in rows_of(tmp_path / "out", "train")] == ["c?", "A?"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--test_size", "0"], "'0' must be a whole number of rows, or a share above 0 and below 1"),
        (["--test_size", "1.5"], "'1.5' must be a whole number"),
        (["--test_size", "nan"], "'nan' must be a whole number"),
        (["--test_size", "2"], "--test_size 2: only 2 rows are left"),
        (["--prompt_column", "question", "--demonstration_column", "x"], "the prompt's and the solution's may do"),
    ],
)
def test_sizes_that_cannot_be_are_refused(flags, message, tmp_path, capsys):
    (tmp_path / "mine.csv").write_text("question,answer\n1?,1\n2?,2\n")
    with pytest.raises(SystemExit) as exit_:
        main(["prepare-data", str(tmp_path / "mine.csv"), "--output_dir", str(tmp_path / "out"), "--no_length",
              "--keep_without_demonstration", *flags])  # fmt: skip
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_the_flag_a_table_of_questions_is_told_about_it(tmp_path, capsys):
    (tmp_path / "mine.csv").write_text("question,answer\n1?,1\n2?,2\n")
    with pytest.raises(SystemExit):
        main(["prepare-data", str(tmp_path / "mine.csv"), "--output_dir", str(tmp_path / "out"), "--no_length"])
    assert "but no completion" in (error := capsys.readouterr().err)
    assert "--keep_without_demonstration takes problems that have none" in error


def test_nothing_to_split_is_said_and_written(tmp_path, capsys):
    rows = [{"prompt": "1?", "completion": "It is \\boxed{3}.", "solution": "2"}]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    main(["prepare-data", str(tmp_path / "mine.jsonl"), "--output_dir", str(tmp_path / "out"), "--no_length",
          "--test_size", "1"])  # fmt: skip
    assert "Nothing was kept" in capsys.readouterr().out
    assert (tmp_path / "out" / "dropped.jsonl").is_file()
