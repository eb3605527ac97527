"""Secrets stay out of what is shown, written and pushed."""

import copy
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from huggingface_hub import get_token


MASK = "***"

# Of an address: https://user:password@host
USER_AND_PASSWORD = re.compile(r"(?<=://)[^/@\s]+(?=@)")

# Tokens of the Hub, whoever they belong to
HUB_TOKEN = re.compile(r"\b(hf|api_org)_[A-Za-z0-9]{16,}\b")

# Names under which libraries and people keep secrets: HF_TOKEN, WANDB_API_KEY, hub_token, PGPASSWORD, DB_PASS
SECRET_NAME = re.compile(
    r"((^|_)(token|api_?keys?|secrets?|(access|secret|private|account|storage|encryption|signing|auth)_?key|passwd"
    r"|passphrase|((db|sql|mysql|pg|postgres|mongo|redis|smtp|mail|ftp|http|proxy|user|admin|root|auth)_?(pass|pwd)))"
    r"|password)(_?\d+)?$",
    re.IGNORECASE,
)

# Tokens of text, numbers of them and switches that are named alike: EOS_TOKEN, image_start_token, MAX_TOKEN,
# HF_HUB_DISABLE_IMPLICIT_TOKEN. What could be a service (BOT_TOKEN, LINE_TOKEN) or a new token is not among them
NO_SECRET_NAME = re.compile(
    r"(^|_)("
    r"bo[adiops]|eo[a-z]|unk|unknown|pad|padding|sep|separator|cls|mask\d?|special|added|blank|newline|delimiter"
    r"|start|end|stop|(begin|start|end)_of_\w+|first|last|next|prefix|suffix|middle|image|img|audio|placeholder"
    r"|boundary|break|think|thinking|thought|reasoning|lang|max|min|max_new|num|n|per|total|draft|prompt|completion"
    r")_token(_?\d+)?$"
    r"|(^|_)(disable|enable|skip|no)_(\w+_)?token$",
    re.IGNORECASE,
)
# How such a token is written, whatever the variable's name: <|im_end|>, </s>, [PAD], <eos>
SPECIAL_TOKEN = re.compile(r"(<[^<>\s]*>)+|\[/?[A-Z_\d]+\]")

# Shorter values of such variables ("1", "true") are no secrets, and would be masked everywhere
SHORTEST_SECRET = 8


def known_secrets(*given: str | None) -> set[str]:
    """The given ones, the token of `hf auth login`, and what the environment keeps under a secret's name."""
    found = {value.strip() for name, value in os.environ.items() if _holds_a_secret(name, value)}
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
            key: MASK if _holds_a_secret(key, item) else redact_values(item, secrets) for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [redact_values(item, secrets) for item in value]
    return redact(value, secrets) if isinstance(value, str) else value


def redact_command(argv: Sequence[str], secrets: Iterable[str] = ()) -> list[str]:
    """A command line with the values of `--hub_token VALUE`, `--hub-token=VALUE` and their like masked."""
    shown: list[str] = []
    for argument in argv:
        flag, equals, value = argument.partition("=")
        if shown and _is_secret_flag(shown[-1], argument):
            shown.append(MASK)
        elif equals and _is_secret_flag(flag, value):
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
    """For a config: its pickles, such as the training_args.bin of each checkpoint, leave the Hub's token out.

    Copies, which stay in this process, keep it; `copy` would make them of what is pickled.
    """

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "hub_token": None}

    def __copy__(self) -> Self:
        made = type(self).__new__(type(self))
        made.__dict__ |= self.__dict__
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        made = memo[id(self)] = type(self).__new__(type(self))  # before its fields, one of which may lead back to it
        made.__dict__ |= copy.deepcopy(self.__dict__, memo)
        return made


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


def _holds_a_secret(name: Any, value: Any) -> bool:
    """Of a variable or field: whether its value must not be seen. A token of text is none, by its name or its form."""
    if not isinstance(name, str) or not SECRET_NAME.search(name) or NO_SECRET_NAME.search(name):
        return False
    return not (isinstance(value, bool | None) or (isinstance(value, str) and SPECIAL_TOKEN.fullmatch(value.strip())))


def _is_secret_flag(argument: str, value: str) -> bool:
    name = argument[2:].replace("-", "_")
    return argument.startswith("--") and "=" not in argument and _holds_a_secret(name, value)
