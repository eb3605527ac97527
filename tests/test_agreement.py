"""Prompts, demonstrations and generation that disagree about thoughts or EOS are named before training."""

import logging

import pytest
from datasets import Dataset

from luffy_trl.demonstrations.agreement import disagreements


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
    found = disagreements(chat_tokenizer, [0], rows(*completions), {"chat_template": template})
    assert len(found) == len(expected)
    assert all(message.startswith(start) for message, start in zip(found, expected, strict=True))


def test_plain_prompts_and_several_demonstrations(chat_tokenizer):
    row = {"prompt": "q\n<think>\n", "demonstrations": ["<think>\na</think>b", "c"]}
    [message] = disagreements(chat_tokenizer, [0], [row])
    assert message.startswith("1 of 2 demonstrations looked at have no '</think>', although")


def test_a_turn_that_ends_where_generation_does_not_stop(chat_tokenizer):
    template = "{% for m in messages %}{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    end, other = chat_tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert disagreements(chat_tokenizer, [other, end], rows("b"), {"chat_template": template}) == []
    [message] = disagreements(chat_tokenizer, [other], rows("b"), {"chat_template": template})
    assert message.startswith(
        "The chat template ends an assistant's turn with '<|im_end|>', but generation stops at '<|endoftext|>'."
    )


def test_a_generation_without_any_reward_is_said(make_trainer, caplog):
    with caplog.at_level(logging.WARNING):
        make_trainer(reward=lambda completions, **kwargs: [None] * len(completions), max_steps=1).train()
    assert "No reward function had a reward for any completion of the first generation (all None)" in caplog.text


def test_a_window_that_is_too_short_is_said(make_trainer, caplog):
    with caplog.at_level(logging.WARNING):
        make_trainer(max_completion_length=127)
        assert "window" not in caplog.text
        make_trainer(max_completion_length=128)
    assert "max_completion_length=128 and a prompt are more than the 128 tokens of the model's window" in caplog.text


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
