"""`luffy-trl prepare-model` on a GGUF file: its weights, its tokens, and a model that trains, saves and loads."""

import json

import numpy as np
import pytest
import torch
from gguf import MODEL_ARCH, GGUFWriter, get_tensor_name_map
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Tokenizer

from luffy_trl.commands.cli import main

from .conftest import save_tiny_qwen2


MERGES = ["h a", "i s"]
TURNS = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


def write_gguf(path, model, tokenizer, says, parts=slice(None)):
    """As llama.cpp's converter writes a Qwen2: its names for the tensors, byte-level tokens, and what it `says`."""
    writer, config = GGUFWriter(path, "qwen2"), model.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges(MERGES)
    writer.add_chat_template(TURNS)
    for name, value in says.items():
        writer.add_uint32(f"tokenizer.ggml.{name}", value)
    names = get_tensor_name_map(MODEL_ARCH.QWEN2, config.num_hidden_layers)
    for name, tensor in list(model.state_dict().items())[parts]:
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stem, kind = name.rsplit(".", 1)
        writer.add_tensor(f"{names.get_name(stem)}.{kind}", tensor.numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES)]
    merges = [tuple(merge.split()) for merge in MERGES]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=merges, eos_token=special[2], pad_token=special[0])
    tokenizer.add_special_tokens({"additional_special_tokens": special[1:]})
    directory = save_tiny_qwen2(tmp_path_factory.mktemp("source"), tokenizer, max_position_embeddings=256)
    return AutoModelForCausalLM.from_pretrained(directory), tokenizer


@pytest.fixture
def packed(source, tmp_path):
    """A file that says, as SmolLM2's does, that padding is what ends a turn."""
    end = source[1].convert_tokens_to_ids("<|im_end|>")
    says = {"bos_token_id": 1, "eos_token_id": end, "padding_token_id": end}
    return write_gguf(tmp_path / "tiny.gguf", *source, says)


def prepare(model, output_dir, *arguments):
    main(["prepare-model", "--model_name_or_path", str(model), "--output_dir", str(output_dir), *arguments])
    return output_dir


def test_the_model_is_the_one_that_was_packed(packed, source, tmp_path):
    out = prepare(packed, tmp_path / "out")
    ids = source[1]("What is 7 * 8?", return_tensors="pt").input_ids
    assert AutoTokenizer.from_pretrained(out)("What is 7 * 8?").input_ids == ids[0].tolist()
    with torch.no_grad():
        expected, logits = (m(ids).logits for m in (source[0], AutoModelForCausalLM.from_pretrained(out)))
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_a_turn_ends_with_its_end_and_padding_hides_none(packed, tmp_path):
    out = prepare(packed, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config
    assert (config["eos_token_id"], config["pad_token_id"]) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [tokenizer.eos_token_id]


def test_generation_stops_where_the_file_says_that_turns_end(source, tmp_path):
    path = write_gguf(tmp_path / "two.gguf", *source, {"eos_token_id": 2, "eot_token_id": 1, "padding_token_id": 0})
    out = prepare(path, tmp_path / "out")
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [2, 1]


def test_a_former_end_pads_under_a_template_with_another(source, tmp_path):
    """A base, which pads with the token that ends its texts."""
    path = write_gguf(tmp_path / "base.gguf", *source, {"eos_token_id": 0, "eot_token_id": 0, "padding_token_id": 0})
    out = prepare(path, tmp_path / "out", "--template", "chatml")
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [2, 0]


def test_a_template_whose_end_is_the_files_padding_gets_another(source, tmp_path):
    path = write_gguf(tmp_path / "base.gguf", *source, {"eos_token_id": 0, "padding_token_id": 2})
    tokenizer = AutoTokenizer.from_pretrained(prepare(path, tmp_path / "out", "--template", "chatml"))
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_one_part_of_a_file_in_several_is_refused(source, tmp_path, capsys):
    path = write_gguf(tmp_path / "a-00001-of-00002.gguf", *source, {"eos_token_id": 2}, parts=slice(0, 9))
    lacks = len(source[0].state_dict()) - 9 - 1  # of a file without a head the embedding is taken for it
    assert f"lacks {lacks} of the model's weights" in refused(path, tmp_path / "out", capsys)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_head_that_is_the_embedding_is_not_missing(source, tmp_path):
    directory = save_tiny_qwen2(tmp_path / "tied", source[1], tie_word_embeddings=True)
    tied = AutoModelForCausalLM.from_pretrained(directory)
    packed = write_gguf(tmp_path / "tied.gguf", tied, source[1], {"eos_token_id": 2})
    unpacked = AutoModelForCausalLM.from_pretrained(prepare(packed, tmp_path / "out"))
    ids = torch.arange(8)[None]
    torch.testing.assert_close(unpacked(ids).logits, tied(ids).logits, atol=1e-5, rtol=1e-5)


def test_it_is_saved_loaded_and_saved_again(packed, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(prepare(packed, tmp_path / "out", "--dtype", "bfloat16"))
    assert model.dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_a_file_in_a_directory_is_named(packed, tmp_path, capsys):
    out = prepare(packed.parent, tmp_path / "out", "--gguf_file", packed.name, "--rope_theta", "40000")
    assert "of the GGUF reader" in capsys.readouterr().out  # of EOS or of padding: versions differ in where they err
    assert json.loads((out / "config.json").read_text())["rope_parameters"]["rope_theta"] == 40000


@pytest.mark.parametrize(
    ("says", "message"),
    [
        ({"padding_token_id": 0}, "names no end of a turn (tokenizer.ggml.eos_token_id)"),
        ({"eos_token_id": 0, "padding_token_id": 0}, "has no token for padding but the one that ends a turn"),
    ],
)
def test_a_file_without_its_tokens_is_refused(source, tmp_path, capsys, says, message):
    path = write_gguf(tmp_path / "tiny.gguf", *source, says)
    assert message in refused(path, tmp_path / "out", capsys)
    assert [file.name for file in tmp_path.iterdir()] == ["tiny.gguf"]


def test_what_is_no_such_file_is_refused(tmp_path, chat_model_dir, capsys):
    (tmp_path / "torch.gguf").write_bytes(b"PK\x03\x04")
    out = tmp_path / "out"
    assert "is no GGUF file" in refused(tmp_path / "torch.gguf", out, capsys)
    assert "there is no such file" in refused(tmp_path / "other.gguf", out, capsys)
    assert "--dtype float16 is of a GGUF file" in refused(chat_model_dir, out, capsys, "--dtype", "float16")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.05, 0.1, 0.5, 0.9, 0.999])
def test_a_file_that_is_cut_is_refused(packed, tmp_path, capsys, share):
    whole = packed.read_bytes()
    packed.write_bytes(whole[: max(4, int(share * len(whole)))])
    assert "tiny.gguf cannot be read by Transformers" in refused(packed, tmp_path / "out", capsys)
    assert [file.name for file in tmp_path.iterdir()] == ["tiny.gguf"]


def refused(model, out, capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as stop:
        prepare(model, out, *arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err
