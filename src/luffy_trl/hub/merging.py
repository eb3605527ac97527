"""An adapter merged into its base: for the time of a push, or as a directory of its own."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from transformers import AutoTokenizer
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.utils import CONFIG_NAME
from trl.trainer.utils import create_model_from_path

from .card import CARD, CURVES, PLACEHOLDER, card_for_hub
from .errors import PushError, explain
from .files import REPLACED_TOGETHER, check_weights, files_below, is_pushed


MERGED_PREFIX = "_merged-"


def check_adapter(directory: Path) -> None:
    """Raises PushError unless an adapter lies there."""
    if not (directory / "adapter_config.json").is_file():
        raise PushError(f"{directory} holds no adapter that could be merged")


@contextmanager
def merged(adapter: Path, output_dir: Path) -> Iterator[Path]:
    """A directory with the adapter merged into its base, for the time of the `with` block.

    Raises:
        PushError: if they cannot be merged.
    """
    check_adapter(adapter)
    with tempfile.TemporaryDirectory(prefix=MERGED_PREFIX, dir=output_dir) as directory:
        merge(adapter, Path(directory))
        yield Path(directory)


def write_merged(adapter: Path, output_dir: Path, target: Path) -> None:
    """Write the adapter merged into its base, with the card of the run, as the new directory `target`, or nothing.

    Raises:
        PushError: if they cannot be merged.
        OSError: if it cannot be written.
    """
    check_adapter(adapter)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as directory:
        unfinished = Path(directory) / target.name
        unfinished.mkdir()
        merge(adapter, unfinished)
        if (output_dir / CARD).is_file():
            (unfinished / CARD).write_bytes(card_for_hub(output_dir, PLACEHOLDER, merged=True))
        if (output_dir / CURVES).is_file():
            shutil.copyfile(output_dir / CURVES, unfinished / CURVES)
        unfinished.rename(target)


def merge(adapter: Path, directory: Path) -> None:
    """Write the merged model, its tokenizer and generation config, and the adapter's other files, but for the card."""
    from peft import PeftConfig, PeftModel

    base_name = None
    try:
        config = PeftConfig.from_pretrained(str(adapter))
        base_name, revision = config.base_model_name_or_path, config.revision
        if base_name is None:
            raise PushError("its adapter_config.json names none")
        base = create_model_from_path(base_name, dtype="auto", device_map=None, revision=revision)
        has_tokenizer = (adapter / TOKENIZER_CONFIG_FILE).is_file()
        tokenizer = (
            AutoTokenizer.from_pretrained(adapter)
            if has_tokenizer
            else AutoTokenizer.from_pretrained(base_name, revision=revision)
        )
        if len(tokenizer) > base.get_input_embeddings().weight.shape[0]:  # of a run that has added tokens
            base.resize_token_embeddings(len(tokenizer))
        model = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
    except Exception as error:  # of files, of the Hub, of shapes that differ: whatever it is, it is one sentence
        reason = explain(error)
        # A RuntimeError is of the network where something is pushed; here it is of the model
        passes = reason.passes and not isinstance(error, RuntimeError)
        base_text = "its base" if base_name is None else f"its base {base_name}"
        raise PushError(f"the adapter in {adapter} cannot be merged into {base_text}: {reason}", passes) from error
    model.save_pretrained(directory)
    if not has_tokenizer:
        tokenizer.save_pretrained(directory)
    # A whole model that lies beside the adapter, of an earlier run, must not take the merged one's place
    not_copied = (*REPLACED_TOGETHER, CONFIG_NAME, CARD)
    for name, path in files_below(adapter):
        if is_pushed(name) and not any(fnmatch(name, pattern) for pattern in not_copied):
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, directory / name)
    check_weights(directory)
