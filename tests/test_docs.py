"""The site: its commands run or say what they need, its references are complete, public names are documented."""

import dataclasses
import importlib.util
import inspect
import os
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from trl import GRPOConfig

from luffy_trl import LuffyConfig
from luffy_trl.commands.inputs import LuffyScriptArguments

from .conftest import HUNG
from .test_train_script import build_text_model


ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
# What an example may need that no test has
NEEDS = {"gpu", "network", "hub account", "several machines", "a script of yours", "files of yours"}
BLOCK = re.compile(r"(?:<!-- (needs|run by): (.+?) -->\n)?```(bash|python)\n(.*?)```", flags=re.DOTALL)
# Every example on these pages without a comment is run by this file
RUN_HERE = {"index.md"}

spec = importlib.util.spec_from_file_location("reference_hook", DOCS / "reference_hook.py")
assert spec is not None
assert spec.loader is not None
reference_hook = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = reference_hook
spec.loader.exec_module(reference_hook)


def blocks(page: Path) -> list[tuple[str, str, str, str]]:
    return BLOCK.findall(page.read_text())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_each_example_is_run_or_says_what_it_needs(page):
    assert len(blocks(page)) == len(re.findall(r"^```(?:bash|python)$", page.read_text(), flags=re.MULTILINE))
    for kind, value, _, code in blocks(page):
        if kind == "needs":
            assert set(value.split(", ")) <= NEEDS, f"{page.name} needs {value}: not one of {sorted(NEEDS)}"
        elif kind == "run by":
            path, _, name = value.partition("::")
            assert name in (ROOT / path).read_text(), f"{page.name}: there is no test {value}"
        else:
            assert page.name in RUN_HERE, (
                f"{page.name}: no test runs this. Put `<!-- needs: gpu -->` (or another of {sorted(NEEDS)}) or "
                f"`<!-- run by: tests/FILE.py::TEST -->` on the line before it:\n{code}"
            )


def test_the_rewards_example_is_a_reward():
    [(_, _, _, code)] = blocks(DOCS / "rewards.md")
    names: dict = {}
    exec(code, names)
    assert names["reward"](["It is \\boxed{56}"], solution=["56"]) == [1.0]


@pytest.mark.slow
def test_the_quickstart_goes_from_a_table_to_a_trained_model(tmp_path):
    """As printed, but for a tiny model, the CPU and fewer steps."""
    build_text_model(["What is 7 * 8? 7 * 8 = 56. The answer is \\boxed{56}."] * 4, tmp_path / "model")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "NO_COLOR": "1"}
    ran = 0
    for kind, _, language, code in blocks(DOCS / "index.md"):
        if kind:
            continue
        code = code.replace("Qwen/Qwen2.5-0.5B-Instruct", "model").replace("\\\n", " ")
        code = code.replace("--max_steps 40", "--max_steps 1 --use_cpu --bf16 False").replace("256", "64")
        code = re.sub(r"^luffy-trl ", f"{shlex.quote(sys.executable)} -m luffy_trl ", code, flags=re.MULTILINE)
        command = [sys.executable, "-c", code] if language == "python" else ["bash", "-euc", code]
        result = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=HUNG, check=False
        )
        assert result.returncode == 0, code + result.stdout + result.stderr
        if "train" in code and language == "bash":
            assert "eval_reward" in result.stdout
        ran += 1
    assert ran == 3
    assert (tmp_path / "out" / "mine" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("config", "parent"),
    [(LuffyConfig, GRPOConfig), (LuffyScriptArguments, LuffyScriptArguments.__mro__[1])],
)
def test_the_configuration_page_has_each_field_of_ours(config, parent):
    source = (DOCS / "configuration.md").read_text()
    # the class itself comes before those that it inherits from
    documented = {
        field.name: field
        for file, name in reversed(reference_hook.DIRECTIVE.findall(source))
        for field in reference_hook.documented_fields(ROOT / file, name)
    }
    inherited = {field.name: field for field in dataclasses.fields(parent)}
    page = reference_hook.expand_fields(source)
    for field in dataclasses.fields(config):
        if field.name in inherited and field.metadata == inherited[field.name].metadata:
            continue
        assert documented[field.name].help == field.metadata["help"]
        assert documented[field.name].default == field.default
        assert page.count(f'<a id="{field.name}"></a>') == 1
    assert "::fields" not in page


def test_a_field_without_help_is_refused(tmp_path):
    (tmp_path / "config.py").write_text("class Config:\n    steps: int = field(default=1)\n")
    with pytest.raises(ValueError, match=r"config.py: Config.steps has no help"):
        reference_hook.documented_fields(tmp_path / "config.py", "Config")


def public_objects():
    for name in re.findall(r"^::: (\S+)", (DOCS / "api.md").read_text(), flags=re.MULTILINE):
        try:
            target = import_module(name)
        except ModuleNotFoundError:
            module, _, attribute = name.rpartition(".")
            target = getattr(import_module(module), attribute)
        yield name, target


def test_each_public_name_is_documented():
    seen = 0
    for name, target in public_objects():
        members = {name: target}
        if inspect.ismodule(target):
            public = getattr(target, "__all__", None) or [
                key
                for key, value in vars(target).items()
                if not key.startswith("_") and getattr(value, "__module__", None) == name
            ]
            members |= {f"{name}.{key}": getattr(target, key) for key in public}
        for path, member in members.items():
            seen += 1
            text = member.__doc__ or ""
            assert text.strip(), f"{path} has no docstring"
            assert not re.match(rf"{path.rsplit('.', 1)[-1]}\(", text.strip()), f"{path} has no docstring of its own"
    assert seen > 20


def test_the_api_page_has_what_the_package_exports():
    page = (DOCS / "api.md").read_text()
    for name in ("LuffyTrainer", "LuffyConfig", *import_module("luffy_trl.rewards").__all__):
        assert name in page


def test_the_figure_is_what_its_script_draws():
    script: dict = {"__name__": "mixed_group", "__file__": str(DOCS / "assets" / "mixed_group.py")}
    exec((DOCS / "assets" / "mixed_group.py").read_text(), script)
    assert (DOCS / "assets" / "mixed_group.svg").read_text() == script["draw"]()
