"""Prompts, demonstrations and generation that disagree about thoughts or EOS are named before training."""

import logging

import pytest
from datasets import Dataset

from luffy_trl.demonstrations.agreement import disagreements, turn_endings


CLOSED = "{% for m in messages %}{{ m['content'] + '<|endoftext|>' }}{% endfor %}"
OPEN = CLOSED + "{% if add_generation_prompt %}{{ '\n<think>\n' }}{% endif %}"


def rows(*completions: str | None) -> list[dict]:
    return [
        {"prompt": [{"role": "user", "content": "q"}], "completion": text and [{"role": "assistant", "content": text}]}
        for text in completions
    ]


@pytest.mark.parametrize(
    ("template", "completions", "expected"),
    [
        (OPEN, ["<think>\na\n</think>\nb", "a</think>b", None], []),
        (CLOSED, ["<think>a</think>b", " <think>a</think>b"], []),
        (CLOSED, ["b", "c"], []),  # no thoughts at all
        (
            OPEN,
            ["b", "a</think>b"],
            ["1 of 2 demonstrations looked at have no '</think>', although their prompt ends"],
        ),
        (
            CLOSED,
            ["a</think>b", "c</think>d"],
            ["2 of 2 demonstrations looked at close a thought with '</think>' that"],
        ),
        (OPEN, ["\n<think>\na</think>b"], ["1 of 1 demonstrations looked at open a thought with '<think>' although"]),
        (CLOSED, ["<think>a</think>b", "c"], ["1 of 2 demonstrations looked at have no '</think>', while the others"]),
    ],
)
def test_thoughts(chat_tokenizer, template, completions, expected):
    found = disagreements(chat_tokenizer, rows(*completions), {"chat_template": template})
    assert len(found) == len(expected)
    assert all(message.startswith(start) for message, start in zip(found, expected, strict=True))


def test_plain_prompts_and_several_demonstrations(chat_tokenizer):
    row = {"prompt": "q\n<think>\n", "demonstrations": ["<think>\na</think>b", "c"]}
    [message] = disagreements(chat_tokenizer, [row])
    assert message.startswith("1 of 2 demonstrations looked at have no '</think>', although")


TURNS = "{% for m in messages %}{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (TURNS, "<|im_end|>"),
        (TURNS.replace("'<|im_end|>", "' \n<|im_end|>"), "<|im_end|>"),  # blanks before it
        (TURNS.replace("<|im_end|>", "<|endoftext|>"), None),
        ("{% for m in messages %}{{ m['content'] + '\n\n' }}{% endfor %}", None),  # ended by nothing
        ("{% for m in messages %}{{ m['content'] + '### ' }}{% endfor %}", "#"),
        ("{{ raise_exception('no conversations') }}", None),
    ],
)
def test_a_turn_that_ends_where_generation_does_not_stop(chat_tokenizer, template, end):
    [stop, other] = chat_tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    found = turn_endings(chat_tokenizer, [stop], {"chat_template": template})
    assert len(found) == (end is not None)
    for message in found:
        assert message.startswith(
            f"The chat template ends an assistant's turn with {end!r}, but generation stops at '<|endoftext|>'."
        )
    assert turn_endings(chat_tokenizer, [stop, other], {"chat_template": TURNS}) == []


def test_a_generation_without_any_reward_is_said(make_trainer, caplog):
    with caplog.at_level(logging.WARNING):
        make_trainer(reward=lambda completions, **kwargs: [None] * len(completions), max_steps=1).train()
    assert "No reward function had a reward for any completion of the first generation (all None)" in caplog.text


def test_a_window_that_is_too_short_is_said(make_trainer, caplog):
    with caplog.at_level(logging.WARNING):
        make_trainer(max_completion_length=128 - 15)
        assert "window" not in caplog.text
        make_trainer(max_completion_length=128 - 14)
    assert "max_completion_length=114 and the longest prompt (row 0, 15 tokens) are more than the 128" in caplog.text


def test_the_trainer_says_so(make_trainer, walks, caplog):
    with caplog.at_level(logging.WARNING):
        make_trainer(walks.map(lambda row: {"prompt": row["prompt"] + "<think>\n"}))
    assert "16 of 16 demonstrations looked at have no '</think>'" in caplog.text


@pytest.mark.parametrize(("rewarded", "warned"), [(False, True), (True, False)])
def test_demonstrations_that_the_reward_does_not_accept(make_trainer, walks, caplog, rewarded, warned):
    demonstrations = set(walks["completion"])

    def reward(completions, **kwargs):
        return [float(text in demonstrations and rewarded) for text in completions]

    with caplog.at_level(logging.WARNING):
        make_trainer(reward=reward, max_steps=1).train()
    assert ("No demonstration of the first generation earned a reward" in caplog.text) == warned


def test_a_stream_is_compared_too(make_trainer, walks, caplog):
    stream = Dataset.from_list(walks.to_list()).map(lambda row: {"prompt": row["prompt"] + "<think>\n"})
    with caplog.at_level(logging.WARNING):
        make_trainer(stream.to_iterable_dataset())
    assert "16 of 16 demonstrations looked at have no '</think>'" in caplog.text
