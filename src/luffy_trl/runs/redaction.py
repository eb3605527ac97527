"""Secrets stay out of what is shown, written and pushed."""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import get_token


MASK = "***"

# Of an address: https://user:password@host
USER_AND_PASSWORD = re.compile(r"(?<=://)[^/@\s]+(?=@)")

# Tokens of the Hub, whoever they belong to
HUB_TOKEN = re.compile(r"\b(hf|api_org)_[A-Za-z0-9]{16,}\b")

# Names under which libraries and people keep secrets: HF_TOKEN, WANDB_API_KEY, hub_token, password
SECRET_NAME = re.compile(r"(^|_)(token|api_?key|secret|password|access_key)$", re.IGNORECASE)

# Shorter values of such variables ("1", "true") are no secrets, and would be masked everywhere
SHORTEST_SECRET = 8


def known_secrets(*given: str | None) -> set[str]:
    """The given ones, the token of `hf auth login`, and what the environment keeps under a secret's name."""
    found = {value for name, value in os.environ.items() if SECRET_NAME.search(name)}
    return {secret for secret in {*given, get_token(), *found} if secret and len(secret) >= SHORTEST_SECRET}


def redact(text: str, secrets: Iterable[str] = ()) -> str:
    """The text with the secrets, what looks like a token of the Hub, and names in addresses masked."""
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, MASK)
    return USER_AND_PASSWORD.sub(MASK, HUB_TOKEN.sub(MASK, text))


def redact_values(value: Any, secrets: Iterable[str] = ()) -> Any:
    """Mappings and lists with every value masked that has a secret's name, and `redact` applied to all text."""
    if isinstance(value, Mapping):
        return {
            key: MASK if _is_secret_name(key) and item is not None else redact_values(item, secrets)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [redact_values(item, secrets) for item in value]
    return redact(value, secrets) if isinstance(value, str) else value


def redact_command(argv: Sequence[str], secrets: Iterable[str] = ()) -> list[str]:
    """A command line with the values of `--hub_token VALUE`, `--hub-token=VALUE` and their like masked."""
    shown: list[str] = []
    for argument in argv:
        flag, equals, _ = argument.partition("=")
        if shown and _is_secret_flag(shown[-1]):
            shown.append(MASK)
        elif equals and _is_secret_flag(flag):
            shown.append(f"{flag}={MASK}")
        else:
            shown.append(_redact_argument(argument, secrets))
    return shown


def _redact_argument(argument: str, secrets: Iterable[str]) -> str:
    """Of JSON, as fields that are mappings are given, the values with a secret's name too."""
    flag, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    if value.startswith("{"):
        try:
            value = json.dumps(redact_values(json.loads(value), secrets))
        except ValueError:
            return f"{flag}{equals}{MASK}"
    return f"{flag}{equals}{redact(value, secrets)}"


class NoTokenInPickles:
    """For a config: its pickles, such as the training_args.bin of each checkpoint, leave the Hub's token out."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "hub_token": None}


def holds_secret(path: Path, secrets: Iterable[str]) -> bool:
    """Whether one of the secrets stands in the file, whatever its format."""
    wanted = [secret.encode() for secret in secrets]
    if not wanted:
        return False
    overlap, last = max(map(len, wanted)) - 1, b""
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            if any(secret in last + block for secret in wanted):
                return True
            last = block[-overlap:] if overlap else b""
    return False


def _is_secret_name(name: Any) -> bool:
    return isinstance(name, str) and SECRET_NAME.search(name) is not None


def _is_secret_flag(argument: str) -> bool:
    return argument.startswith("--") and "=" not in argument and _is_secret_name(argument[2:].replace("-", "_"))
