"""What can be said about a model before it is loaded: that it is there."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from . import EvaluationError


ADAPTER_CONFIG = "adapter_config.json"


def read_adapter_config(directory: str, flag: str) -> dict[str, Any]:
    """
    Args:
        flag: that names the directory.

    Raises:
        EvaluationError: if there is no adapter's configuration in it, or a damaged one.
    """
    path = Path(directory) / ADAPTER_CONFIG
    if not path.is_file():
        raise EvaluationError(f"{flag} {directory}: there is no {ADAPTER_CONFIG} in it.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise EvaluationError(f"{flag} {directory}: its {ADAPTER_CONFIG} cannot be read: {error}.") from error
    if not isinstance(config, dict):
        raise EvaluationError(f"{flag} {directory}: its {ADAPTER_CONFIG} is {type(config).__name__}, not an object.")
    return config


def check_model(model: str, model_args: Mapping[str, Any]) -> None:
    """
    Raises:
        EvaluationError: if there is no such model, in a local directory, the cache or on the Hub.
    """
    adapter = Path(model) / ADAPTER_CONFIG
    if adapter.is_file() and not (Path(model) / "config.json").is_file():
        base = read_adapter_config(model, "--model").get("base_model_name_or_path")
        raise EvaluationError(f"--model {model} is a LoRA adapter: give --model {base} --adapter {model}.")
    try:
        AutoConfig.from_pretrained(
            model,
            revision=model_args.get("revision", "main"),
            trust_remote_code=bool(model_args.get("trust_remote_code", False)),
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        where = (
            "a directory without a model" if Path(model).is_dir() else "neither a local directory nor found on the Hub"
        )
        raise EvaluationError(f"--model {model} is {where} ({reason})") from error
