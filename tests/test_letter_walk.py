"""The embedded task: its problems, tokenizer, reward and base."""

import random
from collections import Counter
from itertools import islice

import pytest
from transformers import AutoTokenizer

from luffy_trl.tasks.letter_walk import (
    MAX_COMPLETION_LENGTH,
    MAX_LENGTH,
    Walk,
    distinct_walks,
    letter_walk_reward,
    sample_walk,
    split_walks,
    to_dataset,
)


def test_one_walk_worked_by_hand():
    walk = Walk("k", (4, -5, 1, 9))  # k o j k t
    assert walk.prompt() == "Dk+4-5+1+9....:"
    assert walk.prompt("C") == "Ck+4-5+1+9....:"
    assert walk.demonstration == "k;o;j;k;t#t"
    assert Walk("y", (4,)).answer == "c"  # cyclic
    assert Walk("b", (-5,)).answer == "w"


def test_the_rewards_read_what_follows_the_last_mark():
    completions = ["a;b#b", "a;b#c", "a;b", "#a#b", "#b ", "", [{"role": "assistant", "content": "a;b#b"}]]
    assert letter_walk_reward(completions, ["b"] * 7) == [1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize("length", range(2, MAX_LENGTH + 1))
def test_demonstrations_are_right_and_stopping_early_never_is(length, tokenizer):
    rng = random.Random(length)
    for walk in (sample_walk(rng, length) for _ in range(200)):
        assert letter_walk_reward([walk.demonstration], [walk.answer]) == [1.0]
        for stop in walk.letters[:-1]:
            assert letter_walk_reward([f"{stop}#{stop}"], [walk.answer]) == [0.0]
        assert len(walk.prompt()) == 15
        assert len(tokenizer(walk.demonstration)["input_ids"]) + 1 <= MAX_COMPLETION_LENGTH


def test_no_constant_offset_is_right_often():
    walks = list(islice(distinct_walks(0, 5), 5000))
    offsets = Counter((ord(walk.answer) - ord(walk.start)) % 26 for walk in walks)
    assert max(offsets.values()) / len(walks) < 0.07


def test_splits_are_reproducible_and_disjoint():
    splits = split_walks(train_size=256, test_size=256, seed=1)
    assert len(set(splits["train"]) | set(splits["test"])) == 512
    assert splits == split_walks(train_size=256, test_size=256, seed=1)
    assert splits != split_walks(train_size=256, test_size=256, seed=2)
    # the test split does not move when the train split grows
    assert splits["test"] == split_walks(train_size=512, test_size=256, seed=1)["test"]
    assert to_dataset(splits["train"]).column_names == ["prompt", "completion", "solution"]


def test_all_walks_of_a_length_are_found_when_there_are_few():
    assert len(list(distinct_walks(0, 2))) == 26 * 5


def test_an_impossible_length_is_refused():
    with pytest.raises(ValueError, match="length=8: a walk has 2 to 7 letters"):
        sample_walk(random.Random(0), 8)


def test_the_tokenizers_tokens_are_characters_and_survive_saving(tokenizer, tiny_model_dir):
    for t in (tokenizer, AutoTokenizer.from_pretrained(tiny_model_dir)):
        assert len(t) == len(tokenizer) == 46
        text = "Dk+4-5....:k;o;j#j"
        ids = t(text)["input_ids"]
        assert len(ids) == len(text)
        assert t.decode(ids) == text
        assert t.decode([*ids, t.eos_token_id], skip_special_tokens=True) == text
        messages = [{"role": "user", "content": "Dk:"}, {"role": "assistant", "content": "k#k"}]
        assert t.apply_chat_template(messages, tokenize=False) == "Dk:k#k<eos>"
        assert t.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True) == "Dk:"
