"""One command of a run, and what is on record of it: of what it was made, and that it ended well."""

import json
import secrets
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from ..runs.whole_files import write_whole
from . import ComparisonError
from .plan import MODEL, Recipe


RECIPE, BEGUN, DONE = "recipe.yaml", "begun.json", "done.json"


@dataclass(frozen=True)
class Took:
    """Seconds of the clock, and of processors: those do not grow where other work shares the machine."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0

    def __add__(self, other: "Took") -> "Took":
        return Took(self.seconds + other.seconds, self.cpu_seconds + other.cpu_seconds)


@dataclass(frozen=True)
class Step:
    """
    Attributes:
        settings: what it depends on: another value needs another directory.
        recipe: that is written for the command; None: it reads none.
        after: the step whose model it takes; None: it takes the base.
        makes: a folder of its own elsewhere, which the command refuses to find.
    """

    what: str
    directory: Path
    command: list[str]
    settings: dict[str, Any]
    recipe: Recipe | None = None
    after: "Step | None" = None
    makes: Path | None = None

    def took(self) -> Took | None:
        """Over all attempts that were seen to end; None if it has not ended well, with the model that is now there.

        Raises:
            ComparisonError: if it was done with other settings, or as far as a checkpoint.
        """
        if self.after is not None and self.after.took() is None:
            return None
        begun, done = self._read(BEGUN), self._read(DONE)
        is_of_another_model = begun.get("after") != self._before()
        if is_of_another_model or not (done or any((self.directory / MODEL).glob("checkpoint-*"))):
            return None
        try:
            kept: dict[str, Any] = dict(begun["settings"])
            took = Took(float(done["seconds"]), float(done["cpu_seconds"])) if done and done["id"] else None
        except (ValueError, KeyError, TypeError) as error:
            raise ComparisonError(
                f"What {self.directory} says of itself is damaged, or of an earlier version. Choose another "
                "--output_dir, or remove it: then it is done anew."
            ) from error
        names = [n for n in sorted({*kept, *self.settings}) if _text(kept.get(n)) != _text(self.settings.get(n))]
        if names:
            raise ComparisonError(
                f"{self.directory} was made with other settings ({', '.join(names)}). Choose another --output_dir, or "
                "remove it: then it is done anew, and what was made from it."
            )
        return took

    def begin(self) -> None:
        """Make its directory: as an earlier attempt has left it, or empty if that was of other settings or models."""
        record = {"after": self._before(), "settings": self.settings}
        if self.directory.exists() and _text(self._read(BEGUN)) != _text(record):
            shutil.rmtree(self.directory)
        if self.makes is not None and self.makes.exists():
            shutil.rmtree(self.makes)
        self.directory.mkdir(parents=True, exist_ok=True)
        self._write(BEGUN, record)
        if self.recipe is not None:
            (self.directory / RECIPE).write_text(yaml.safe_dump(self.recipe, sort_keys=False), encoding="utf-8")

    def end(self, took: Took) -> None:
        """`id` is another each time: what was made after another one is done anew."""
        self._write(DONE, {"id": secrets.token_hex(8)} | asdict(took))

    def _before(self) -> str | None:
        return None if self.after is None else self.after._read(DONE).get("id")

    def _read(self, name: str) -> dict[str, Any]:
        path = self.directory / name
        if not path.is_file():
            return {}
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ComparisonError(f"{path} is damaged: remove {self.directory}, and it is done anew.") from error

    def _write(self, name: str, record: dict[str, Any]) -> None:
        write_whole(self.directory / name, json.dumps(record, indent=1, default=str))


def _text(value: Any) -> str:
    """Equal for what is equal once it is written: dates are texts there, as are the keys of mappings."""
    return json.dumps(json.loads(json.dumps(value, default=str)), sort_keys=True)
