"""Chat templates that refuse, lose or end things in their own way: said by row, before any weights are loaded."""

import copy
import json
import logging

import pytest
from datasets import Dataset
from transformers import AutoTokenizer, LlavaNextImageProcessorPil, LlavaNextProcessor, Qwen2Config

from luffy_trl import LuffyTrainer
from luffy_trl.commands.cli import main
from luffy_trl.demonstrations.agreement import disagreements, turn_endings
from luffy_trl.demonstrations.encoding import IDS_COLUMN, DemonstrationEncoder, demonstrations_of
from luffy_trl.demonstrations.prompts import Reader, check_prompts

from .conftest import SMALL_RUN


TURN = "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
CHATML = "{% for m in messages %}" + TURN + "{% endfor %}" + ASK
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
)
ALTERNATING = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    + TURN
    + "{% endfor %}"
    + ASK
)
KNOWN_ROLES = (
    "{% for m in messages %}{% if m['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('Unknown role: ' + m['role']) }}{% endif %}" + TURN + "{% endfor %}" + ASK
)
PARTS = (  # as those of vision-language models
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% for part in m['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}" + ASK
)
USER, ANSWER = {"role": "user", "content": "What is 7 * 8?"}, {"role": "assistant", "content": "56"}
SYSTEM = {"role": "system", "content": "Be brief."}
WITHOUT_WEIGHTS = ("config.json", "generation_config.json")


def reader(tokenizer, template: str, **config) -> Reader:
    return Reader(tokenizer, Qwen2Config(**config), {"chat_template": template})


@pytest.fixture
def model_with(chat_model_dir, tmp_path):
    """A directory as of a model whose tokenizer has this chat template, and whose weights are not there."""

    def make(template: str | None) -> str:
        directory = tmp_path / "model"
        directory.mkdir()
        for name in WITHOUT_WEIGHTS:
            (directory / name).write_bytes((chat_model_dir / name).read_bytes())
        tokenizer = AutoTokenizer.from_pretrained(chat_model_dir)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(directory)
        return str(directory)

    return make


@pytest.fixture
def refused(tmp_path, capsys):
    """The one line with which a command ends on these rows."""

    def run(command: str, model: str, rows: list[dict], *flags: str, test: list[dict] | None = None) -> str:
        data = tmp_path / "data"
        data.mkdir()
        for name, part in (("train", rows), ("test", test)):
            if part is not None:
                (data / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))
        if command == "prepare-data":
            argv = [command, str(data / "train.jsonl"), "--tokenizer", model, "--output_dir", str(tmp_path / "out")]
        else:
            options = {"output_dir": tmp_path / "out", "model_name_or_path": model, "dataset_name": data}
            options |= SMALL_RUN if command == "train" else {"use_cpu": True, "bf16": False, "report_to": "none"}
            argv = [command, *[str(part) for k, v in options.items() for part in (f"--{k}", v)]]
            argv += ["--reward_funcs", "math_reward"] if command == "train" else []
        with pytest.raises(SystemExit) as stop:
            main([*argv, *flags])
        assert stop.value.code == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    return run


def rows(*prompts: list | str) -> list[dict]:
    return [{"prompt": prompt, "completion": [ANSWER], "solution": "56"} for prompt in prompts]


# Refused


@pytest.mark.parametrize(
    ("command", "flags"),
    [("train", ()), ("train", ("--num_demonstrations", "0")), ("sft", ()), ("prepare-data", ())],
)
def test_a_role_that_the_template_refuses(command, flags, model_with, refused):
    several = rows(*[[USER]] * 3, *[[SYSTEM, USER]] * 5) if command != "prepare-data" else rows(*[[SYSTEM, USER]] * 8)
    line = refused(command, model_with(NO_SYSTEM), several, *flags)
    assert f"ow {0 if command == 'prepare-data' else 3}: `prompt` has a message with the role 'system'" in line
    assert "(System role not supported)" in line
    assert "Put its text into the first user message" in line


def test_prompts_of_evaluation_are_checked_too(model_with, refused):
    good, bad = rows(*[[USER]] * 4), rows([USER], [SYSTEM, USER])
    line = refused("train", model_with(NO_SYSTEM), good, "--eval_strategy", "steps", test=bad)
    assert "Row 1 of `eval_dataset`: `prompt` has a message with the role 'system'" in line


def test_messages_without_a_chat_template(model_with, refused):
    line = refused("train", model_with(None), rows(*[[USER]] * 4))
    assert "Row 0: `prompt` is a list of messages, and the model's tokenizer has no chat template." in line


@pytest.mark.parametrize(
    ("template", "prompt", "message"),
    [
        (NO_SYSTEM, [SYSTEM, USER, ANSWER, USER], "Row 1: `prompt` has a message with the role 'system', which"),
        (KNOWN_ROLES, [{**SYSTEM, "role": "developer"}, USER], "a message with the role 'developer', which"),
        (KNOWN_ROLES, [USER, ANSWER, {"role": "tool", "content": "1"}], "a message with the role 'tool', which"),
        (ALTERNATING, [USER, USER], "Row 1: `prompt`, with the roles user, user, is refused by the model's chat"),
        (ALTERNATING, [SYSTEM, USER], "with the role 'system', which is refused"),
        (CHATML, [{"role": "user", "content": None}], "Row 1: `prompt`, with the roles user, is refused"),
        (CHATML, [{"content": "a"}], "Row 1: `prompt`, with the roles None, is refused"),
        (CHATML, ["What is 7 * 8?"], r"Row 1: `prompt` is list \['What is 7 \* 8\?'\], refused by"),
        ("{{ nonsense.x.y }}", [USER], "Row 0: `prompt`, with the roles user, is refused"),
    ],
)
def test_the_first_row_of_each_form_is_named(chat_tokenizer, template, prompt, message):
    table = [{"prompt": [USER]}, {"prompt": prompt}, {"prompt": prompt}]
    with pytest.raises(ValueError, match=message):
        check_prompts(reader(chat_tokenizer, template), table, "", 16)


@pytest.mark.parametrize("prompt", [[USER], [USER, ANSWER], [SYSTEM, USER], "What is 7 * 8?", [USER, ANSWER, USER]])
def test_what_the_template_takes_is_taken(chat_tokenizer, prompt):
    table = Dataset.from_list([{"prompt": prompt}] * 3)
    assert check_prompts(reader(chat_tokenizer, CHATML), table, "", 16) == []


def test_a_text_that_the_template_loses_is_said(chat_tokenizer):
    no_system = "{% for m in messages if m['role'] != 'system' %}" + TURN + "{% endfor %}" + ASK
    table = [{"prompt": [USER]}, {"prompt": [SYSTEM, USER]}]
    [message] = check_prompts(reader(chat_tokenizer, no_system), table, "", 16)
    assert message.startswith(
        "The chat template leaves out the text of system messages, such as that of row 1, so the"
    )
    [message] = check_prompts(reader(chat_tokenizer, PARTS), [{"prompt": [USER]}], "", 16)  # no processor
    assert message.startswith("The chat template leaves out the text of user messages")
    changed = CHATML.replace("m['content']", "m['content'] | trim")
    assert (
        check_prompts(reader(chat_tokenizer, changed), [{"prompt": [{**USER, "content": " a \n b "}]}], "", 16) == []
    )


# Processors, which are given messages in parts, as TRL does


@pytest.fixture
def processor(chat_tokenizer):
    return LlavaNextProcessor(LlavaNextImageProcessorPil(), chat_tokenizer, chat_template=PARTS)


def test_a_processor_is_given_parts(processor):
    table = [{"prompt": [SYSTEM, USER], "completion": [{**ANSWER, "content": "a</think>56"}]}]
    parts = [{"prompt": [{"role": "user", "content": [{"type": "text", "text": "What?"}]}], "completion": "56"}]
    assert check_prompts(reader(processor, PARTS), table + parts, "", 16) == []
    [closes, some] = disagreements(processor, table + parts)
    assert closes.startswith("1 of 2 demonstrations looked at close a thought")
    assert some.startswith("1 of 2 demonstrations looked at have no '</think>'")
    [ends] = turn_endings(processor, [0])
    assert "ends an assistant's turn with '<|im_end|>'" in ends


# Warnings that end nothing


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        (ALTERNATING, [USER, ANSWER]),
        (ALTERNATING, [ANSWER]),
        (NO_SYSTEM, [SYSTEM, USER]),
        (CHATML, [{"role": "user", "content": None}]),
        (CHATML, ["a"]),
        (PARTS, [USER]),
        ("{{ 1 / 0 }}", [USER]),
    ],
)
@pytest.mark.parametrize("completion", ["<think>a</think>b", [ANSWER], [ANSWER, ANSWER], "", 5, None])
def test_comparing_never_ends_a_run(chat_tokenizer, template, prompt, completion):
    table = [{"prompt": prompt, "completion": completion}]
    messages = disagreements(chat_tokenizer, table, {"chat_template": template})
    messages += turn_endings(chat_tokenizer, [0], {"chat_template": template})
    assert all(isinstance(message, str) for message in messages)


def never(completions, **kwargs):
    return [0.0] * len(completions)


def with_template(tokenizer, template: str):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def test_a_prompt_that_ends_with_an_answer_trains(chat_model_dir, config, chat_tokenizer, caplog):
    table = Dataset.from_list(rows(*[[USER, ANSWER]] * 4))
    tokenizer = with_template(chat_tokenizer, ALTERNATING)
    with caplog.at_level(logging.WARNING):
        trainer = LuffyTrainer(
            str(chat_model_dir), never, config(max_steps=1), train_dataset=table, processing_class=tokenizer
        )
        trainer.train()
    assert trainer.state.global_step == 1
    assert "ends an assistant's turn with '<|im_end|>', but generation stops at '<|endoftext|>'" in caplog.text


def test_rollouts_without_demonstrations_are_warned_of_too(chat_model_dir, config, chat_tokenizer, caplog):
    args, table = config(num_demonstrations=0), Dataset.from_list(rows([USER], [USER]))
    tokenizer = with_template(chat_tokenizer, CHATML)
    with caplog.at_level(logging.WARNING):
        LuffyTrainer(str(chat_model_dir), never, args, train_dataset=table, processing_class=tokenizer)
    assert caplog.text.count("ends an assistant's turn with '<|im_end|>'") == 1


# Ends of turns


@pytest.mark.parametrize(
    ("template", "eos", "expected"),
    [
        (CHATML, ["<|endoftext|>", "<|im_end|>"], "<|im_end|>"),  # as Gemma: generation stops at both
        (CHATML, ["<|endoftext|>"], "<|endoftext|>"),
        (CHATML.replace("<|im_end|>\n", "<|endoftext|>\n"), ["<|endoftext|>", "<|im_end|>"], "<|endoftext|>"),
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", ["<|endoftext|>", "<|im_end|>"], "<|endoftext|>"),
    ],
)
def test_a_demonstration_ends_as_the_template_ends_a_turn(chat_tokenizer, template, eos, expected):
    eos_ids = chat_tokenizer.convert_tokens_to_ids(eos)
    encoder = DemonstrationEncoder(chat_tokenizer, eos_ids, 99, "drop", {"chat_template": template})
    batch = {"prompt": [[USER], "What is 7 * 8?"], "completion": [[ANSWER], "56"]}
    encoded = encoder(batch, [0, 1])
    ends = [demonstrations_of({IDS_COLUMN: ids})[0].token_ids[-1] for ids in encoded[IDS_COLUMN]]
    assert chat_tokenizer.convert_ids_to_tokens(ends) == [expected, "<|endoftext|>"]  # a plain prompt has no turns
    again = encoder.encode("56", {"prompt": [USER]}, "It")
    assert chat_tokenizer.convert_ids_to_tokens(again.token_ids[-1]) == expected


# Thoughts that the prompt has closed already

CLOSED = CHATML.replace("assistant\n", "assistant\n<think>\n\n</think>\n\n")


@pytest.mark.parametrize(
    ("asks", "completion", "expected"),
    [
        ("<think>\n\n</think>\n\n", "<think>\na\n</think>\n56", "open a thought with '<think>' although their prompt"),
        ("<think></think>", " <think>a</think>56", "open a thought with '<think>' although their prompt has already"),
        ("<think>\nNone is needed.\n</think>\n", "<think>a</think>56", "open a thought with '<think>' although"),
        (
            "<think>\n\n</think>\n\nSo:",
            "<think>a</think>56",
            "open a thought with '<think>' although their prompt has",
        ),
        ("<think>\n\n</think>\n\n", "56", None),
        ("<think>\n\n</think>\n\n", "<think>\n\n</think>\n\n56", None),  # the same empty thought: not repeated
        ("<think>\n\n</think>\n\n", "a</think>56", "close a thought with '</think>' that"),
        ("<think>\nFirst,", "a</think>56", None),
        ("<think>\nFirst,", "56", "have no '</think>', although their prompt"),
        ("<think>\nFirst,", "<think>a</think>56", "open a thought with '<think>' although their prompt already ends"),
    ],
)
def test_what_the_prompt_says_of_thoughts(chat_tokenizer, asks, completion, expected):
    template = CHATML.replace("assistant\n", "assistant\n" + asks)
    # what users write about thoughts opens and closes none
    question = {"role": "user", "content": "Think between <think> and </think>, or leave it: <think>"}
    found = disagreements(
        chat_tokenizer, [{"prompt": [question], "completion": completion}], {"chat_template": template}
    )
    assert len(found) == (expected is not None)
    assert all(message.startswith(f"1 of 1 demonstrations looked at {expected}") for message in found)


def test_an_empty_thought_is_not_repeated(chat_tokenizer):
    encoder = DemonstrationEncoder(chat_tokenizer, [0], 99, "drop", {"chat_template": CLOSED})
    encoded = encoder.encode("<think>\n\n</think>\n\n56", {"prompt": [USER]}, "It")
    assert chat_tokenizer.decode(encoded.token_ids) == "56<|endoftext|>"
