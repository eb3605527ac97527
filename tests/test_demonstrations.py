"""From the dataset's columns to token ids: the data contract, and what breaks it."""

import random
from array import array

import pytest
from datasets.fingerprint import Hasher

from luffy_trl.demonstrations.encoding import (
    DROPPED_COLUMN,
    IDS_COLUMN,
    LOGPS_COLUMN,
    TRUNCATED_COLUMN,
    Demonstration,
    DemonstrationEncoder,
    demonstration_text,
)
from luffy_trl.demonstrations.placement import place_demonstrations
from luffy_trl.demonstrations.rendering import without_repeated_opening
from luffy_trl.tasks.letter_walk import build_tokenizer


@pytest.fixture
def encode(tokenizer):
    """Encode rows given as columns."""

    def run(overflow="drop", max_length=8, prompt="Da", start=0, eos=(1,), **columns):
        rows = len(next(iter(columns.values())))
        encoder = DemonstrationEncoder(tokenizer, eos, max_length, overflow, chat_template_kwargs={})
        encoded = encoder({"prompt": [prompt] * rows, **columns}, list(range(start, start + rows)))
        for name, code in ((IDS_COLUMN, "i"), (LOGPS_COLUMN, "f")):
            if name in encoded:
                encoded[name] = [[array(code, value).tolist() for value in row] for row in encoded[name]]
        return encoded

    return run


def assistant(content, **extra):
    return [{"role": "assistant", "content": content, **extra}]


def test_ids_are_the_texts_tokens_then_eos(encode, tokenizer):
    columns = encode(completion=["ab#b", None, assistant("c"), "d<eos>"])
    eos = tokenizer.eos_token_id
    assert columns[IDS_COLUMN] == [
        [[*tokenizer("ab#b")["input_ids"], eos]],
        [],
        [[*tokenizer("c")["input_ids"], eos]],
        [[*tokenizer("d")["input_ids"], eos]],  # not a second EOS
    ]
    assert columns[DROPPED_COLUMN] == columns[TRUNCATED_COLUMN] == [0, 0, 0, 0]
    assert LOGPS_COLUMN not in columns


def test_several_demonstrations_in_plain_and_conversational_form(encode, tokenizer):
    columns = encode(demonstrations=[["a", assistant("b")], None, []])
    texts = [[tokenizer.decode(ids) for ids in row] for row in columns[IDS_COLUMN]]
    assert texts == [["a<eos>", "b<eos>"], [], []]


@pytest.mark.parametrize(
    ("overflow", "ids", "counts"), [("drop", [4], [[1, 0], [0, 0]]), ("truncate", [8, 4], [[0, 0], [1, 0]])]
)
def test_too_long(encode, overflow, ids, counts):
    columns = encode(overflow, demonstrations=[["abcdefgh", "abc"], ["a"]])  # 9, 4 and 2 tokens; 8 fit
    assert [len(x) for x in columns[IDS_COLUMN][0]] == ids
    assert [columns[DROPPED_COLUMN], columns[TRUNCATED_COLUMN]] == counts


def test_the_longest_that_fits(encode):
    assert len(encode(completion=["abcdefg"])[IDS_COLUMN][0][0]) == 8
    with pytest.raises(ValueError, match=r"Row 5: `completion` has 9 tokens, .* max_completion_length=8"):
        encode("error", completion=["abcdefgh"], start=5)


def test_behavior_logps_follow_their_tokens(encode):
    columns = encode(
        "truncate",
        max_length=3,
        completion=["ab", "abc", None, "a"],
        completion_logps=[[-1.0, -2.0, 0.0], [-1.0, -2.0, -3.0, -4.0], None, None],
    )
    assert columns[LOGPS_COLUMN] == [[[-1.0, -2.0, 0.0]], [[-1.0, -2.0, -3.0]], [], [[]]]


@pytest.mark.parametrize(
    ("logps", "message"),
    [
        ([-1.0, -1.0], r"Row 0: `completion_logps` has 2 values, but `completion` has 3 tokens"),
        ([-1.0, 0.5, -1.0], r"Row 0: `completion_logps`\[1\] is 0.5"),
        ([-1.0, -1.0, float("nan")], r"`completion_logps`\[2\] is nan"),
        ([-1.0, float("-inf"), -1.0], r"`completion_logps`\[1\] is -inf"),
        ([None, -1.0, -1.0], r"`completion_logps`\[0\] is None"),
    ],
)
def test_logps_that_cannot_be(encode, logps, message):
    with pytest.raises(ValueError, match=message):
        encode(completion=["ab"], completion_logps=[logps])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("", "Row 7: `completion` is empty"),
        ("  \n", "Row 7: `completion` is empty"),
        (assistant(""), "Row 7: `completion` is empty"),
        (3, "Row 7: `completion` is int 3, no text; expected a str, or a list with exactly one assistant message"),
        (assistant(None), "Row 7: `completion` is NoneType None, no text"),
        ([], r"Row 7: `completion` is a list with roles \[\]"),
        ([{"role": "user", "content": "a"}], r"is a list with roles \['user'\]"),
        (assistant("a") + assistant("b"), r"is a list with roles \['assistant', 'assistant'\]"),
        ([{"role": "user", "content": "a"}, *assistant("b")], "The messages before it go in `prompt`"),
        (["a"], r"is a list with roles \[\"str 'a'\"\]"),
        (
            assistant("a", reasoning_content="because"),
            "Row 7: `completion` has 'reasoning_content' beside its content",
        ),
        (assistant("a", tool_calls=[{"name": "f"}]), "has the tool call dict {'name': 'f'}, expected {'type'"),
        ("a<eos>b", "Row 7: `completion` holds the end-of-sequence token '<eos>' before its end"),
    ],
)
def test_demonstrations_that_are_none(encode, value, message):
    with pytest.raises(ValueError, match=message):
        encode(completion=[value], start=7)


def test_the_wrong_one_of_several_is_named(encode):
    with pytest.raises(ValueError, match=r"Row 4: `demonstrations\[1\]` is empty"):
        encode(demonstrations=[["a"], ["a", ""]], start=3)
    with pytest.raises(ValueError, match=r"Row 3: `demonstrations` is str 'abc', expected a list of completions"):
        encode(demonstrations=["abc"], start=3)


def test_content_parts_and_absent_fields():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert demonstration_text(assistant(parts), "here") == "ab"
    assert demonstration_text(assistant("a", tool_calls=None), "here") == "a"  # Arrow fills fields with None


@pytest.mark.parametrize(
    ("prompt", "text", "expected"),
    [
        ("...<think>\n", "<think>\nhm</think>", "hm</think>"),
        ("...<think>", "<think>\nhm</think>", "\nhm</think>"),
        ("...<think>\n", "hm</think>", "hm</think>"),
        ("...", "<think>\nhm</think>", "<think>\nhm</think>"),
        ("<think>\n...", "<think>\nhm</think>", "<think>\nhm</think>"),
    ],
)
def test_an_opening_that_the_prompt_has_is_not_repeated(prompt, text, expected):
    assert without_repeated_opening(prompt, text) == expected


def test_the_opening_is_compared_with_the_rendered_prompt():
    # the template, and what it is given, decide how a prompt ends
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["<think>", "\n"])
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['content'] }}{% endfor %}"
        "{% if add_generation_prompt and thinking %}<think>\n{% endif %}"
    )
    batch = {"prompt": [[{"role": "user", "content": "a"}]], "completion": [assistant("<think>\nb")]}
    for thinking, expected in [(True, "b<eos>"), (False, "<think>\nb<eos>")]:
        encoder = DemonstrationEncoder(tokenizer, [tokenizer.eos_token_id], 8, "drop", {"thinking": thinking})
        [[ids]] = encoder(batch, [0])[IDS_COLUMN]
        assert tokenizer.decode(array("i", ids).tolist()) == expected


def test_the_encoder_is_hashed_for_the_datasets_cache(tokenizer):
    encoders = [DemonstrationEncoder(tokenizer, [1], length, "drop", {}) for length in (8, 8, 9, 8)]
    encoders[-1].version += 1  # another way of encoding
    hashes = [Hasher.hash(encoder) for encoder in encoders]
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3


def test_a_rollout_ends_at_any_of_the_models_eos_tokens(encode, tokenizer):
    [hash_] = tokenizer("#")["input_ids"]
    texts = [tokenizer.decode(ids) for [ids] in encode(completion=["a#", "b"], eos=(1, hash_))[IDS_COLUMN]]
    assert texts == ["a#", "b<eos>"]  # ended already, ended now
    with pytest.raises(ValueError, match="Row 0: `completion` holds the end-of-sequence token '#' before its end"):
        encode(completion=["a#b"], eos=(1, hash_))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (None, "Row 2: `prompt` is NoneType None, expected a str or a list of messages"),
        ("", "Row 2: `prompt` is str ''"),
        ([], r"Row 2: `prompt` is list \[\]"),
    ],
)
def test_prompts_that_cannot_be(encode, prompt, message):
    for completion in ("a", "<think>a</think>b"):  # which is compared with the prompt
        with pytest.raises(ValueError, match=message):
            encode(prompt=prompt, completion=[completion], start=2)


def ints(*values):
    return array("i", values).tobytes()


def row(*ids):
    return {IDS_COLUMN: [ints(i) for i in ids]}


def test_demonstrations_take_the_last_rows_of_their_group():
    rows = [row(1, 2)] * 3 + [row()] * 3 + [row(3)] * 3
    placed = place_demonstrations(rows, group_size=3, per_group=2)
    one, two, three = (Demonstration([i]) for i in (1, 2, 3))
    assert placed == [None, one, two, None, None, None, None, None, three]


def test_the_choice_follows_pythons_generator():
    rows = [row(*range(10))] * 4
    random.seed(3)
    first = [place_demonstrations(rows, 4, 2) for _ in range(5)]
    random.seed(3)
    assert [place_demonstrations(rows, 4, 2) for _ in range(5)] == first
    assert len({str(choice) for choice in first}) > 1


def test_logps_of_the_chosen_one():
    rows = [{IDS_COLUMN: [ints(1, 2)], LOGPS_COLUMN: [array("f", [-1.0, -2.0]).tobytes()]}] * 2
    rows += [{IDS_COLUMN: [ints(3)], LOGPS_COLUMN: [b""]}] * 2
    placed = place_demonstrations(rows, 2, 1)
    assert placed == [None, Demonstration([1, 2], [-1.0, -2.0]), None, Demonstration([3], None)]
