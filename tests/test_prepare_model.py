"""`luffy-trl prepare-model`: the weights as they were; another window, template and end of a turn."""

import json

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from luffy_trl import LuffyTrainer
from luffy_trl.commands.cli import main


QUESTION = {"role": "user", "content": "What is 7 * 8?"}
SYSTEM_PROMPT = 'Think "aloud"\nin {{braces}} and \\boxed{}; 思考.'


def prepare(model, output_dir, *arguments) -> None:
    main(["prepare-model", "--model_name_or_path", str(model), "--output_dir", str(output_dir), *map(str, arguments)])


@pytest.fixture
def prepared(chat_model_dir, tmp_path):
    context = ["--rope_theta", 40000, "--max_position_embeddings", 16384]
    prompt = ["--template", "chatml", "--think", "--system_prompt", SYSTEM_PROMPT]
    prepare(chat_model_dir, tmp_path / "prepared", *context, *prompt)
    return tmp_path / "prepared"


def test_only_the_configuration_and_the_tokenizer_change(prepared, chat_model_dir, chat_tokenizer):
    config, before = AutoConfig.from_pretrained(prepared), AutoConfig.from_pretrained(chat_model_dir)
    assert config.rope_parameters["rope_theta"] == 40000
    assert config.max_position_embeddings == 16384
    changed = {k for k, value in config.to_dict().items() if before.to_dict()[k] != value}
    assert changed - {"_name_or_path"} == {"rope_parameters", "max_position_embeddings", "eos_token_id"}
    weights, expected = (load_file(d / "model.safetensors") for d in (prepared, chat_model_dir))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)

    tokenizer = AutoTokenizer.from_pretrained(prepared)
    assert tokenizer("a b\n<|im_end|>")["input_ids"] == chat_tokenizer("a b\n<|im_end|>")["input_ids"]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    stops = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert GenerationConfig.from_pretrained(prepared).eos_token_id == stops
    model = AutoModelForCausalLM.from_pretrained(prepared)
    # the new theta is the one that counts: positions turn more slowly
    torch.testing.assert_close(model.model.rotary_emb.inv_freq[1].item(), 40000 ** (-2 / 8))


def test_a_prompt_ends_inside_a_thought(prepared):
    render = AutoTokenizer.from_pretrained(prepared).apply_chat_template
    start = f"<|im_start|>system\n{SYSTEM_PROMPT}<|im_end|>\n<|im_start|>user\nWhat is 7 * 8?<|im_end|>\n"
    prompt = render([QUESTION], tokenize=False, add_generation_prompt=True)
    assert prompt == start + "<|im_start|>assistant\n<think>\n"
    # nothing is opened behind an answer, and a system prompt of the conversation's own is kept
    answered = [{"role": "system", "content": "Be brief."}, QUESTION, {"role": "assistant", "content": "56"}]
    assert render(answered, tokenize=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is 7 * 8?<|im_end|>\n"
        "<|im_start|>assistant\n56<|im_end|>\n"
    )


def test_plain_names_for_a_model_without_tokens_for_turns(tiny_model_dir, tmp_path):
    prepare(tiny_model_dir, tmp_path / "plain", "--template", "plain")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "plain")
    conversation = [{"role": "system", "content": "s"}, QUESTION, {"role": "assistant", "content": "56"}]
    assert tokenizer.apply_chat_template(conversation, tokenize=False) == (
        f"s\n\nUser: What is 7 * 8?\nAssistant: 56{tokenizer.eos_token}\n"
    )
    prompt = tokenizer.apply_chat_template([QUESTION], tokenize=False, add_generation_prompt=True)
    assert prompt == "User: What is 7 * 8?\nAssistant:"


def test_it_trains_and_the_demonstration_continues_the_thought(prepared, config):
    rows = [{"prompt": [QUESTION], "completion": "<think>\n7*8\n</think>\n\n56", "solution": "56"}] * 4
    rows = Dataset.from_list(
        [row | {"completion": [{"role": "assistant", "content": row["completion"]}]} for row in rows]
    )

    seen = []

    def reward(prompts, completions, **kwargs):
        seen.extend(completion[0]["content"] for completion in completions)
        return [float(len(completion[0]["content"])) for completion in completions]

    trainer = LuffyTrainer(str(prepared), reward, config(max_steps=1, max_completion_length=24), train_dataset=rows)
    trainer.train()
    assert "7*8\n</think>\n\n56" in seen


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--template", "own"], "no chat template of its own: choose --template chatml or plain"),
        (["--eos_token", "<|nope|>"], "--eos_token '<|nope|>' is no token of this tokenizer"),
        (["--template", "llama"], "invalid choice: 'llama'"),
        (["--rope_theta", "many"], "invalid float value: 'many'"),
        (["--rope_theta", "0"], "--rope_theta 0.0 must be a number above 0"),
        (["--rope_theta", "inf"], "--rope_theta inf must be a number above 0"),
        (["--max_position_embeddings", "-5"], "--max_position_embeddings -5 must be a number above 0"),
        (["--no_such_flag"], "unrecognized arguments: --no_such_flag"),
    ],
)
def test_what_cannot_work_is_said_and_nothing_written(chat_model_dir, tmp_path, capsys, arguments, message):
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as stop:
        prepare(chat_model_dir, out, *arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_existing_directory_a_missing_model_and_pickled_weights(chat_model_dir, tmp_path, capsys):
    def error(model, out) -> str:
        with pytest.raises(SystemExit):
            prepare(model, out)
        return capsys.readouterr().err

    assert "exists. Choose another, or remove it" in error(chat_model_dir, tmp_path)
    assert "nobody/no-such-model" in error("nobody/no-such-model", tmp_path / "out")
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    for file in chat_model_dir.iterdir():
        target = file.name if file.suffix != ".safetensors" else "pytorch_model.bin"
        (pickled / target).write_bytes(file.read_bytes())
    assert "has no *.safetensors: pickled weights are not read" in error(pickled, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_nothing_behind(chat_model_dir, tmp_path, monkeypatch, capsys):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", full)
    with pytest.raises(SystemExit):
        prepare(chat_model_dir, tmp_path / "out")
    assert "No space left on device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("think", "expected"), [([], "close a thought"), (["--think"], "agree with the template")])
def test_it_compares_the_template_with_demonstrations(chat_model_dir, tmp_path, capsys, think, expected):
    rows = [{"prompt": [QUESTION], "completion": [{"role": "assistant", "content": "7*8\n</think>\n\n56"}]}] * 3
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    prepare(chat_model_dir, tmp_path / "out", *think, "--template", "chatml", "--dataset_name", data)
    assert expected in capsys.readouterr().out
