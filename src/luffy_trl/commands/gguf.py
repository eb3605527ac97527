"""A GGUF file as a model that can be trained: unpacked weights, and the tokens that GGUF's readers mix up put right.

What Transformers makes of such a file cannot be saved (its configuration says that it is quantised), may end its turns
with the token that begins them, and may pad with the token that ends them, which hides every end from the loss.
"""

import struct
from collections.abc import Callable
from importlib.util import find_spec
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase


ENDING = ".gguf"
# Tokens of vocabularies that end no turn, in the order in which one is taken for padding
PADDING = (
    "<|endoftext|>", "<|end_of_text|>", "<pad>", "<|pad|>", "[PAD]", "<|finetune_right_pad_id|>", "<unk>", "<|unk|>"
)  # fmt: skip

STOPS = ("eos_token_id", "eot_token_id")

# What reading a file that is cut, damaged or of an unknown architecture comes to
BROKEN = (
    AttributeError,
    IndexError,
    KeyError,
    NotImplementedError,
    OverflowError,
    TypeError,
    ValueError,
    struct.error,
)


def gguf_path(model: str, file: str | None, revision: str | None) -> Path | None:
    """The file to unpack, downloaded if need be; None: the model is no GGUF file.

    Args:
        model: a model of the Hub, its directory, or the file itself.
        file: its name in the repository or directory.

    Raises:
        ValueError: if there is no such file, or what reads it is not installed.
        OSError: if it cannot be had from the Hub.
    """
    if file is None and not model.endswith(ENDING):
        return None
    if find_spec("gguf") is None:
        raise ValueError("A GGUF file is read with gguf: pip install 'luffy_trl[gguf]'.")
    if file is None:
        path = Path(model)
    elif Path(model).is_dir():
        path = Path(model) / file
    else:
        path = Path(hf_hub_download(model, file, revision=revision))
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file.")
    with open(path, "rb") as opened:
        if opened.read(4) != b"GGUF":
            raise ValueError(f"{path} is no GGUF file: it does not begin as one.")
    return path


def unpack(
    path: Path,
    directory: Path,
    dtype: torch.dtype,
    end_of: Callable[[PreTrainedTokenizerBase], str] = attrgetter("eos_token"),
) -> dict[str, tuple[Any, Any]]:
    """Write model and tokenizer of a GGUF file to a directory, as `from_pretrained` reads them.

    Args:
        end_of: the token that is to end an answer, which may be another than the file's, the default.

    Returns:
        {what: (before, after)} of what had to be put right.

    Raises:
        ValueError: for an architecture that Transformers does not read from GGUF, and for a file without what is
            needed.
    """
    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**where)
        model, loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=dtype, output_loading_info=True)
    except BROKEN as error:
        raise ValueError(f"{path} cannot be read by Transformers: {' '.join(str(error).split())}") from error
    if missing := sorted(loaded["missing_keys"]):
        raise ValueError(
            f"{path} lacks {len(missing)} of the model's weights ({missing[0]} is the first): merge a model in "
            "several files to one with llama.cpp's gguf-split."
        )
    says = _metadata(path)
    changed = _set_tokens(tokenizer, says, path, end_of)
    tokenizer.save_pretrained(directory)
    _write_weights(model, tokenizer, [says[name] for name in STOPS if name in says], directory)
    return changed


def _metadata(path: Path) -> dict[str, Any]:
    """What the file says of its tokenizer, the vocabulary left out."""
    from gguf import GGUFReader

    names = (*STOPS, "padding_token_id")
    fields = GGUFReader(path).fields
    found = {name: fields.get(f"tokenizer.ggml.{name}") for name in names}
    return {name: int(field.contents()) for name, field in found.items() if field is not None}


def _set_tokens(
    tokenizer: PreTrainedTokenizerBase,
    says: dict[str, int],
    path: Path,
    end_of: Callable[[PreTrainedTokenizerBase], str],
) -> dict[str, tuple[str | None, str]]:
    """EOS as the file has it, and a padding token that ends nothing."""
    before = tokenizer.eos_token, tokenizer.pad_token
    if "eos_token_id" not in says:
        raise ValueError(f"{path} names no end of a turn (tokenizer.ggml.eos_token_id), without which nothing ends.")
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(says["eos_token_id"])
    # The file's EOS can pad where another token is to end answers
    ends = {tokenizer.convert_tokens_to_ids(end_of(tokenizer))} | ({says.get("eot_token_id")} - {says["eos_token_id"]})
    padding = says.get("padding_token_id")
    if padding is None or padding in ends:
        known = tokenizer.get_vocab()
        padding = next((known[token] for token in PADDING if token in known and known[token] not in ends), None)
    if padding is None:
        raise ValueError(f"{path} has no token for padding but the one that ends a turn, which would hide it.")
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(padding)
    tokenizer.clean_up_tokenization_spaces = False  # the text is what was sampled
    after = tokenizer.eos_token, tokenizer.pad_token
    names = ("eos_token of the GGUF reader", "pad_token of the GGUF reader")
    return {name: (b, a) for name, b, a in zip(names, before, after, strict=True) if b != a}


def _write_weights(model: Any, tokenizer: PreTrainedTokenizerBase, stops: list[int], directory: Path) -> None:
    """The model made anew from configuration and weights: this one remembers that it was quantised."""
    values = model.config.to_dict()
    for name in ("quantization_config", "_model_name_or_path", "_name_or_path"):
        values.pop(name, None)
    values |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = AutoConfig.for_model(**values)
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = GenerationConfig.from_model_config(config)
    plain.generation_config.eos_token_id = stops
    plain.save_pretrained(directory)
