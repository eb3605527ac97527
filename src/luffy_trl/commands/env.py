"""`luffy-trl env`: what a bug report needs to say of a machine, and nothing that is no one's business."""

import argparse
import os
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.commands.config import default_config_file

from ..hub.card import PACKAGES, versions
from ..runs.redaction import known_secrets, redact, redact_values


# Beside those that a model card names
OTHER_PACKAGES = ("huggingface_hub", "kernels", "flash_attn", "lm_eval", "math_verify", "numpy")


def main(argv: Sequence[str], prog: str) -> None:
    parser = argparse.ArgumentParser(
        prog=prog, description="Print versions, hardware and Accelerate's configuration, for a bug report."
    )
    parser.parse_args(argv)
    secrets = known_secrets()
    for name, value in facts():
        print(f"- {name}: {redact(home_as_tilde(value), secrets)}")


def facts() -> Iterator[tuple[str, str]]:
    yield "platform", platform.platform()
    yield "python", platform.python_version()
    found = versions((*PACKAGES, *OTHER_PACKAGES))
    yield from found.items()
    yield "not installed", ", ".join(name for name in (*PACKAGES, *OTHER_PACKAGES) if name not in found)
    yield "CPUs", str(os.cpu_count())
    yield "memory", gibibytes(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    yield "GPUs", ", ".join(gpus()) or "none"
    yield "CUDA of torch", str(torch.version.cuda)
    yield "accelerate's default config", accelerate_config(Path(default_config_file))


def gibibytes(size: int) -> str:
    return f"{size / 2**30:.0f} GiB"


def gpus() -> Iterator[str]:
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        yield f"{about.name} ({gibibytes(about.total_memory)})"
    if torch.backends.mps.is_available():
        yield "Apple's (mps)"


def accelerate_config(path: Path) -> str:
    """What `accelerate launch` takes if it is told nothing, without secrets, in one line."""
    if not path.is_file():
        return "none"
    try:
        config: Any = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML
        return yaml.safe_dump(redact_values(config), default_flow_style=True, sort_keys=False, width=10**6).strip()
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        return f"{path} cannot be read: {type(error).__name__}"


def home_as_tilde(text: str) -> str:
    home = str(Path.home())
    return text.replace(home, "~") if len(home) > 1 else text
