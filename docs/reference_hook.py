"""A hook of MkDocs: writes the configuration reference out of the dataclasses' help strings.

A line `::fields FILE CLASS` in a page becomes a list of the fields that the class declares. The source is read, not
imported: the site's environment needs neither torch nor TRL.
"""

import ast
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any


ROOT = Path(__file__).parents[1]
DIRECTIVE = re.compile(r"^::fields (\S+) (\w+)$", flags=re.MULTILINE)
# [`LuffyConfig`] and [`~trl.GRPOConfig`], as Hugging Face's docstrings mark names, once they are HTML
NAME_IN_BRACKETS = re.compile(r"\[<code>~?([^<]+)</code>\](?!\(|\[)")


@dataclass(frozen=True)
class DocumentedField:
    name: str
    type: str
    default: Any
    help: str

    def markdown(self) -> str:
        """An entry of a definition list, with an anchor."""
        default = f'"{self.default}"' if isinstance(self.default, str) else repr(self.default)
        text = re.sub(r"(?<![\w'])'([^' ]+)'", r"`\1`", self.help)
        return f'<a id="{self.name}"></a>`{self.name}`: `{self.type}` = `{default}`\n:   {text}\n'


def documented_fields(path: Path, class_name: str) -> list[DocumentedField]:
    """The fields that a dataclass itself declares, in their order.

    Raises:
        ValueError: if there is no such class, or a field of it has no help.
    """
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            return [
                _documented(statement, f"{path.name}: {class_name}")
                for statement in node.body
                if isinstance(statement, ast.AnnAssign)
            ]
    raise ValueError(f"{path} has no class {class_name}.")


def _documented(statement: ast.AnnAssign, where: str) -> DocumentedField:
    name = ast.unparse(statement.target)
    options = {}
    if isinstance(statement.value, ast.Call):  # of dataclasses.field
        options = {keyword.arg: ast.literal_eval(keyword.value) for keyword in statement.value.keywords}
    if not options.get("metadata", {}).get("help"):
        raise ValueError(f"{where}.{name} has no help.")
    return DocumentedField(name, ast.unparse(statement.annotation), options["default"], options["metadata"]["help"])


def expand_fields(markdown: str) -> str:
    """The page with each `::fields` line replaced. A field that stands above already is not repeated."""
    shown: set[str] = set()

    def expand(match: re.Match) -> str:
        fields = [field for field in documented_fields(ROOT / match[1], match[2]) if field.name not in shown]
        shown.update(field.name for field in fields)
        return "\n".join(field.markdown() for field in fields)

    return DIRECTIVE.sub(expand, markdown)


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Called by MkDocs with the text of each page."""
    return expand_fields(markdown)


def on_page_content(html: str, **kwargs: Any) -> str:
    """Called by MkDocs with each page as HTML."""
    return NAME_IN_BRACKETS.sub(r"<code>\1</code>", html)
