"""The folder listing is the architecture: what may import what, and how large a room may be."""

import ast
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "luffy_trl"


def check_imports(config: Path) -> subprocess.CompletedProcess:
    command = [Path(sys.executable).parent / "lint-imports", "--no-cache", config]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_imports_follow_the_rules():
    result = check_imports(ROOT / "pyproject.toml")
    assert result.returncode == 0, result.stdout
    assert "6 kept, 0 broken" in result.stdout


def test_the_rules_can_be_broken(tmp_path):
    rules = (ROOT / "pyproject.toml").read_text()
    for held, broken in [('    "runs",\n]', "]"), ('"commands",\n    "trainer"', '"trainer",\n    "commands"')]:
        assert held in rules
        (tmp_path / "rules.toml").write_text(rules.replace(held, broken))
        result = check_imports(tmp_path / "rules.toml")
        assert result.returncode == 1
        assert "Imports go down the house" in result.stdout


def test_about_ten_modules_at_the_top():
    assert len(list(SOURCE.glob("*.py"))) <= 12


def test_the_trainer_is_read_in_ten_minutes():
    text = (SOURCE / "trainer.py").read_text()
    assert len(text.splitlines()) <= 450
    [trainer] = [node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)]
    assert trainer.end_lineno - trainer.lineno + 1 <= 350


def functions():
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield path.relative_to(SOURCE), node


def test_no_function_is_longer_than_a_screen():
    lengths = {f"{path}:{node.name}": node.end_lineno - node.lineno + 1 for path, node in functions()}
    assert len(lengths) > 400
    assert {name: length for name, length in lengths.items() if length > 60} == {}


def test_one_name_for_one_thing():
    """Public classes and constants of the package have one home each."""
    homes: dict[str, set[str]] = {}
    for path in SOURCE.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = []
            if isinstance(node, ast.ClassDef):
                names = [node.name]
            elif isinstance(node, ast.Assign):
                names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            for name in names:
                if not name.startswith("_") and name != "logger":
                    homes.setdefault(name, set()).add(str(path.relative_to(SOURCE)))
    assert {name: sorted(paths) for name, paths in homes.items() if len(paths) > 1} == {}
