"""LoRA adapters where whole models belong."""

import json
from pathlib import Path

from transformers.utils import CONFIG_NAME, cached_file, find_adapter_config_file


def refuse_adapter(where: str, model: str, revision: str | None = None) -> None:
    """Raises ValueError, starting with `where`, if the model, of the Hub or a directory, is an adapter alone.

    A directory with an adapter and a configuration beside it is refused too: it would be loaded as both.
    """
    path = find_adapter_config_file(model, revision=revision)
    if path is None or (not Path(model).is_dir() and _has_own_configuration(model, revision)):
        return
    base = json.loads(Path(path).read_text(encoding="utf-8")).get("base_model_name_or_path")
    raise ValueError(
        f"{where} is a LoRA adapter of {base}, and no whole model. Merge it into its base first (docs/hub.md), or "
        "train the base, with --use_peft for a new adapter."
    )


def _has_own_configuration(model: str, revision: str | None) -> bool:
    return cached_file(model, CONFIG_NAME, revision=revision, _raise_exceptions_for_missing_entries=False) is not None
