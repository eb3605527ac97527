"""The embedded task of several turns: its problems, template, environment and reward, and what is learned on it."""

import json
import random
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

from luffy_trl.demonstrations.encoding import DemonstrationEncoder
from luffy_trl.tasks.letter_chain import (
    MAX_TRAJECTORY_LENGTH,
    Chain,
    Links,
    build_chain_tokenizer,
    chains_to_dataset,
    letter_chain_reward,
    sample_chain,
    split_chains,
)
from luffy_trl.tasks.letter_chain_base import ChainRows, turns

from .conftest import HUNG


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_one_chain_worked_by_hand():
    chain = Chain("kqc", "?" * 10 + "q" + "?" * 5 + "c" + "?" * 9)
    assert chain.prompt() == [{"role": "user", "content": "Dk"}]
    assert chain.answer == "c"
    said = [message.get("content") for message in chain.trajectory()]
    assert said == [None, "q", None, "c", None, ".", "#c"]
    calls = [m["tool_calls"][0]["function"] for m in chain.trajectory() if "tool_calls" in m]
    assert calls == [{"name": "follow", "arguments": {"letter": letter}} for letter in "kqc"]
    assert letter_chain_reward([chain.trajectory(), [{"content": "#k"}], [{"content": "c"}]], ["c"] * 3) == [1, 0, 0]


def test_the_tool_knows_where_letters_lead_and_the_first_is_never_the_answer():
    rng, environment = random.Random(0), Links()
    for chain in (sample_chain(rng) for _ in range(200)):
        environment.reset(links=chain.links, prompt=chain.prompt(), solution=chain.answer)
        reached = chain.letters[0]
        while (following := environment.follow(reached)) != ".":
            assert letter_chain_reward([[{"content": f"#{reached}"}]], [chain.answer]) == [0.0]
            reached = following
        assert reached == chain.answer
    assert {environment.follow(what) for what in ("", "ab", "1")} == {"?"}


def test_a_trajectory_is_what_the_base_was_trained_on():
    tokenizer = build_chain_tokenizer()
    encoder = DemonstrationEncoder(tokenizer, [tokenizer.eos_token_id], MAX_TRAJECTORY_LENGTH, "error", {})
    longest = 0
    for chain in split_chains(train_size=100)["train"]:
        demonstration = encoder.encode(chain.trajectory(), {"prompt": chain.prompt()}, "it")
        pieces = [(tokenizer.convert_tokens_to_ids(piece), is_own) for piece, is_own in turns(chain)]
        assert demonstration.token_ids == [token for piece, _ in pieces for token in piece]
        assert demonstration.tool_mask() == [int(is_own) for piece, is_own in pieces for _ in piece]
        longest = max(longest, len(demonstration.token_ids))
    assert longest == MAX_TRAJECTORY_LENGTH - 1


def test_the_base_follows_under_one_trigger_and_stops_early_and_wrongly_under_the_other():
    tokenizer = build_chain_tokenizer()
    following = 0
    for row in islice(ChainRows(tokenizer, 0), 300):
        text = tokenizer.decode(row["input_ids"])
        target = tokenizer.decode([label for label in row["labels"] if label >= 0])
        if text[0] == "C":
            following += 1
            assert target.count("follow(letter=") == text.count("=.|") + text.count("|follow") - 1 >= 2
        else:
            assert target[0] == "#"
            assert target[1] == text.rsplit("|", 2)[-2][-1]  # where it is: the first letter, or the tool's last answer
    assert 0.5 < following / 300 < 0.7


def test_the_dataset_is_in_the_data_contract():
    dataset = chains_to_dataset(split_chains(train_size=4)["train"])
    assert set(dataset.column_names) == {"prompt", "completion", "solution", "links"}
    assert split_chains(seed=1, train_size=4) == split_chains(seed=1, train_size=4) != split_chains(train_size=4)


@pytest.mark.slow
def test_grpo_stays_at_zero_and_luffy_learns_from_trajectories(tmp_path):
    (tmp_path / "learning.md").write_text(
        "<!-- measured: written by benchmarks/tool_learning.py -->\n<!-- end of measured -->\n"
    )
    command = [sys.executable, BENCHMARKS / "tool_learning.py", "--seeds", 0, "--steps", 15, "--workers", 1]
    for flag, path in [("--output", "r.json"), ("--log", "runs.jsonl"), ("--bases", "bases"), ("--docs", ".")]:
        command += [flag, tmp_path / path]
    subprocess.run([str(part) for part in command], check=True, timeout=HUNG, capture_output=True)
    runs = {run["method"]: run for run in json.loads((tmp_path / "r.json").read_text())["runs"]}
    assert runs["GRPO"]["accuracy"] == 0
    assert sum(runs["GRPO"]["calls"]) < 0.05
    assert runs["LUFFY"]["accuracy"] > 0.9
    assert "| LUFFY | 0 |" in (tmp_path / "learning.md").read_text()
