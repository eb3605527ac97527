"""`luffy-trl prepare-model`: a model made ready for long thoughts.

The paper's base, Qwen2.5-Math, has a window of 4,096 tokens and no habit of thinking. It was given a larger rope theta
and window, and a chat template that ends each prompt inside a thought. Nothing of that touches the weights: the files
are copied as they are, and the configuration and the tokenizer are written anew. A GGUF file is unpacked before.
"""

import argparse
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from ..data.contract import to_contract
from ..data.loading import choose_split, load_splits
from ..demonstrations.agreement import LOOKED_AT, OPENING, disagreements, turn_endings
from ..demonstrations.rendering import rendered_prompt
from ..reporting.tables_and_curves import text_table
from .adapters import refuse_adapter
from .gguf import gguf_path, unpack


# Pickled weights are left behind: they can execute anything
COPIED = ["*.safetensors", "*.safetensors.index.json", "generation_config.json", "LICENSE*", "NOTICE*"]

# One turn after another in the markup that Qwen's models are pretrained with
CHATML = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)
# For tokenizers without tokens for turns: names, as in a transcript, and EOS after each answer
PLAIN = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{{ message['content'] + '\\n\\n' }}"
    "{%- elif message['role'] == 'user' -%}{{ 'User: ' + message['content'] + '\\n' }}"
    "{%- else -%}{{ 'Assistant: ' + message['content'] + eos_token + '\\n' }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'Assistant:' }}{%- endif -%}"
)
CHAT_TEMPLATES = ("own", "chatml", "plain")
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")


def chat_template(tokenizer: PreTrainedTokenizerBase, name: str, system_prompt: str | None, think: bool) -> str:
    """The chat template of that name, with a default system prompt and the opening of a thought, if asked for.

    Raises:
        ValueError: if the tokenizer lacks what the template needs.
    """
    if name == "own":
        if tokenizer.chat_template is None:
            raise ValueError("The tokenizer has no chat template of its own: choose --template chatml or plain.")
        if not isinstance(tokenizer.chat_template, str):
            raise ValueError("The tokenizer has several chat templates: choose --template chatml or plain.")
        template = tokenizer.chat_template
    elif name == "chatml":
        missing = [token for token in CHATML_TOKENS if token not in tokenizer.get_vocab()]
        if missing:
            raise ValueError(
                f"The tokenizer has no token {missing[0]!r}, which --template chatml needs, and new tokens would need "
                "new weights: choose --template plain."
            )
        template = CHATML
    else:
        template = PLAIN
    if system_prompt:
        default = json.dumps(system_prompt, ensure_ascii=False)  # its escapes are Jinja's
        template = (
            "{%- if not messages or messages[0]['role'] != 'system' -%}"
            f"{{%- set messages = [{{'role': 'system', 'content': {default}}}] + messages -%}}"
            "{%- endif -%}" + template
        )
    if think:
        template += "{%- if add_generation_prompt -%}{{ '" + OPENING + "\\n' }}{%- endif -%}"
    return template


def extend_context(config: PretrainedConfig, rope_theta: float | None, window: int | None) -> dict[str, tuple]:
    """Set rope theta and window where given; returns {field: (before, after)} of what changed.

    Raises:
        ValueError: for a value that is none, or if the model has no single rope theta.
    """
    for name, value in (("rope_theta", rope_theta), ("max_position_embeddings", window)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name} {value} must be a number above 0.")
    text = config.get_text_config()
    changed: dict[str, tuple] = {}
    if rope_theta is not None:
        rope = getattr(text, "rope_parameters", None)
        if not isinstance(rope, dict) or "rope_theta" not in rope:
            raise ValueError(f"--rope_theta {rope_theta}: a {config.model_type} model has no single rope theta.")
        changed["rope_theta"] = (rope["rope_theta"], rope_theta)
        rope["rope_theta"] = rope_theta
    if window is not None:
        changed["max_position_embeddings"] = (text.max_position_embeddings, window)
        text.max_position_embeddings = window
    return changed


def prepare_model(args: argparse.Namespace) -> None:
    """Write the prepared model to `args.output_dir`, all of it or nothing.

    Raises:
        ValueError: for what cannot work, before anything is written.
        OSError: if the model cannot be found or read.
    """
    output_dir = Path(args.output_dir)
    if output_dir.exists():
        raise ValueError(f"--output_dir {output_dir} exists. Choose another, or remove it.")
    packed = gguf_path(args.model_name_or_path, args.gguf_file, args.revision)
    if packed is None:
        if args.dtype:
            raise ValueError(f"--dtype {args.dtype} is of a GGUF file: other weights are copied as they are.")
        refuse_adapter(f"--model_name_or_path {args.model_name_or_path}", args.model_name_or_path, args.revision)
        _prepare(args, output_dir, args.model_name_or_path, args.revision, {})
        return
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=output_dir.parent, prefix=f".{output_dir.name}-unpacked-") as directory:
        dtype = getattr(torch, args.dtype or "float32")
        changed = unpack(packed, Path(directory), dtype, lambda tokenizer: _turns(args, tokenizer)[2])
        _prepare(args, output_dir, directory, None, changed)


def _prepare(
    args: argparse.Namespace, output_dir: Path, model: str, revision: str | None, changed: dict[str, tuple]
) -> None:
    """
    Args:
        changed: what was changed before, {what: (before, after)}.
    """
    config = AutoConfig.from_pretrained(model, revision=revision)
    tokenizer = AutoTokenizer.from_pretrained(model, revision=revision)
    changed |= extend_context(config, args.rope_theta, args.max_position_embeddings)
    template, tokenizer.chat_template, end = _turns(args, tokenizer)
    changed["eos_token"] = (tokenizer.eos_token, end)
    source = _weights(model, revision)

    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=output_dir.parent, prefix=f".{output_dir.name}-") as directory:
        unfinished = Path(directory) / output_dir.name
        unfinished.mkdir()
        for pattern in COPIED:
            for file in source.glob(pattern):
                shutil.copyfile(file, unfinished / file.name)
        stops = _set_end(tokenizer, config, unfinished, end)
        config.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        unfinished.rename(output_dir)
    _report(args, changed, template, output_dir, stops)


def _turns(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str, str]:
    """The chat template that is asked for, by name and as written, and the token that ends an answer under it."""
    name = args.template or ("own" if tokenizer.chat_template else "chatml")
    template = chat_template(tokenizer, name, args.system_prompt, args.think)
    end = args.eos_token or ("<|im_end|>" if name == "chatml" else tokenizer.eos_token)
    if end not in tokenizer.get_vocab():
        raise ValueError(f"--eos_token {end!r} is no token of this tokenizer.")
    return name, template, end


def _weights(model: str, revision: str | None) -> Path:
    """The directory that holds the model's safetensors."""
    source = (
        Path(model)
        if Path(model).is_dir()
        else Path(snapshot_download(model, revision=revision, allow_patterns=COPIED))
    )
    if not any(source.glob("*.safetensors")):
        raise ValueError(f"{model} has no *.safetensors: pickled weights are not read. Save it as safetensors first.")
    return source


def _set_end(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, directory: Path, end: str) -> list[int]:
    """Make `end` the tokenizer's EOS, and stop generation at it beside the tokens where it stopped before."""
    before = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # the former EOS: a padding that is EOS would hide it
    tokenizer.eos_token = end
    has_own = (directory / "generation_config.json").is_file()
    generation = GenerationConfig.from_pretrained(directory) if has_own else GenerationConfig.from_model_config(config)
    stops = generation.eos_token_id if generation.eos_token_id is not None else []
    stops = [stops] if isinstance(stops, int) else list(stops)
    stops = list(dict.fromkeys([tokenizer.eos_token_id, *stops, *before]))
    generation.eos_token_id = stops
    config.get_text_config().eos_token_id = tokenizer.eos_token_id
    generation.save_pretrained(directory)
    return stops


def _report(args: argparse.Namespace, changed: dict[str, tuple], template: str, output_dir: Path, stops: list[int]):
    tokenizer = AutoTokenizer.from_pretrained(output_dir)
    rows = [[name, str(before), str(after)] for name, (before, after) in changed.items()]
    print(text_table(["", "before", "after"], rows))
    prompt = rendered_prompt(tokenizer, [{"role": "user", "content": "What is 7 * 8?"}], {})
    print(f"\nA prompt under the chat template ({template}):\n{prompt!r}")
    print(f"\nSaved to {output_dir}")
    if args.dataset_name:
        looked_at = _first_rows(args.dataset_name)
        messages = disagreements(tokenizer, looked_at)
        if any(isinstance(row["prompt"], list) for row in looked_at):
            messages += turn_endings(tokenizer, stops)
        for message in messages:
            print(f"Warning: {message}")
        if not messages:
            print(f"The demonstrations of {args.dataset_name} agree with the template about thoughts and EOS.")


def _first_rows(dataset_name: str) -> list[dict[str, Any]]:
    where = f"--dataset_name {dataset_name}"
    dataset = choose_split(load_splits(dataset_name, where), "train", where, "a dataset that has one")
    return list(to_contract(dataset, where).take(LOOKED_AT))


def main(argv: Sequence[str], prog: str) -> None:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Extend a model's window and give it a chat template, as the paper did. Weights are not touched.",
    )
    parser.add_argument("--model_name_or_path", required=True, help="of the Hub, a directory, or a .gguf file")
    parser.add_argument(
        "--gguf_file", metavar="NAME", help="unpack this file of the model, so that it can be trained (default: none)"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of a GGUF file's weights (default: float32)"
    )
    parser.add_argument("--revision", help="of the model, a branch, tag or commit (default: main)")
    parser.add_argument("--output_dir", required=True, help="where to save it; must not exist")
    parser.add_argument("--rope_theta", type=float, help="the paper's: 40000, from 10000 (default: unchanged)")
    parser.add_argument(
        "--max_position_embeddings", type=int, help="the window, in tokens; the paper's: 16384 (default: unchanged)"
    )
    parser.add_argument(
        "--template",
        choices=CHAT_TEMPLATES,
        help="the chat template: the tokenizer's own, ChatML, or plain names (default: own, if there is one)",
    )
    parser.add_argument("--system_prompt", help="where a conversation brings none (default: the template's)")
    parser.add_argument(
        "--think", action="store_true", help=f"end each prompt with {OPENING}, a newline after it (default: no)"
    )
    parser.add_argument("--eos_token", help="ends an answer (default: <|im_end|> under chatml, else unchanged)")
    parser.add_argument("--dataset_name", help="compare the result with these demonstrations")
    args = parser.parse_args(argv)
    try:
        prepare_model(args)
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:  # the Hub's errors are such, too
        parser.error(f"--model_name_or_path {args.model_name_or_path} or --output_dir {args.output_dir}: {error}")
