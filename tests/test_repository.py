"""What makes the repository one that others can join: versions, workflows, and what assistants read."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from luffy_trl import SUPPORTED_TRL
from luffy_trl.commands.cli import COMMANDS


ROOT = Path(__file__).parents[1]
GITHUB = ROOT / ".github"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
MAKEFILE = (ROOT / "Makefile").read_text()

# File and the schema of it that check-jsonschema brings
SCHEMAS = {
    ".github/workflows/ci.yml": "vendor.github-workflows",
    ".github/workflows/docs.yml": "vendor.github-workflows",
    ".github/workflows/release.yml": "vendor.github-workflows",
    ".github/dependabot.yml": "vendor.dependabot",
    ".github/ISSUE_TEMPLATE/bug.yml": "vendor.github-issue-forms",
    ".github/ISSUE_TEMPLATE/feature.yml": "vendor.github-issue-forms",
    ".github/ISSUE_TEMPLATE/config.yml": "vendor.github-issue-config",
    "CITATION.cff": "vendor.citation-file-format",
}


def validate(path: Path, schema: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, "--default-filetype", "yaml", path],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


# Versions


def requirements(lines: list[str]) -> dict[str, SpecifierSet]:
    return {canonicalize_name(Requirement(line).name): Requirement(line).specifier for line in lines}


def lower_bound(specifier: SpecifierSet) -> Version:
    [bound] = [Version(clause.version) for clause in specifier if clause.operator in (">=", "==")]
    return bound


def test_the_oldest_versions_are_the_lower_bounds():
    tested = ("peft", "deepspeed", "eval", "gguf", "reasoning-gym", "teacher")  # of which `dev` has all
    bounded = requirements([*PROJECT["dependencies"], *(line for extra in tested for line in EXTRAS[extra])])
    lines = (ROOT / "constraints-oldest.txt").read_text().splitlines()
    pinned = requirements([line for line in lines if not line.startswith("#")])
    assert {name: lower_bound(pin) for name, pin in pinned.items()} == {
        name: lower_bound(bound) for name, bound in bounded.items()
    }


def test_what_ci_pins_is_within_the_bounds():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = requirements([line for line in lines if not line.startswith("#")])
    asked = [*PROJECT["dependencies"], *(line for extra in EXTRAS.values() for line in extra)]
    for line in asked:
        requirement = Requirement(line)
        name = canonicalize_name(requirement.name)
        if name in pinned:
            assert lower_bound(pinned[name]) in requirement.specifier, line


def test_the_range_of_trl_is_said_alike():
    assert requirements(PROJECT["dependencies"])["trl"] == SUPPORTED_TRL


def test_only_vllm_keeps_transformers_back():
    assert Version("5.99") in requirements(PROJECT["dependencies"])["transformers"]
    assert Version("6.0") not in requirements(PROJECT["dependencies"])["transformers"]
    assert Version("5.18") not in requirements(EXTRAS["vllm"])["transformers"]


def test_each_python_that_is_named_is_admitted():
    named = [line.split(" :: ")[-1] for line in PROJECT["classifiers"] if "Python :: 3." in line]
    assert named == ["3.11", "3.12", "3.13"]
    assert all(SpecifierSet(PROJECT["requires-python"]).contains(version) for version in named)


# GitHub


@pytest.mark.parametrize("name", SCHEMAS)
def test_it_is_what_its_reader_takes(name):
    result = validate(ROOT / name, SCHEMAS[name])
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_file_for_github_is_checked():
    found = {str(path.relative_to(ROOT)) for path in GITHUB.rglob("*.yml")}
    assert found == {name for name in SCHEMAS if name.startswith(".github")}


def test_a_wrong_workflow_would_be_found(tmp_path):
    text = (GITHUB / "workflows" / "ci.yml").read_text()
    (tmp_path / "ci.yml").write_text(text.replace("runs-on:", "run-on:"))
    assert validate(tmp_path / "ci.yml", "vendor.github-workflows").returncode == 1


def steps():
    for path in sorted((GITHUB / "workflows").glob("*.yml")):
        for job in yaml.safe_load(path.read_text())["jobs"].values():
            yield from ((path.name, step) for step in job["steps"])


def test_every_action_is_pinned_to_a_commit_with_its_version_beside_it():
    lines = [
        line.strip()
        for path in (GITHUB / "workflows").glob("*.yml")
        for line in path.read_text().splitlines()
        if "uses:" in line
    ]
    assert len(lines) >= 8
    for line in lines:
        assert re.fullmatch(r"(- )?uses: [\w-]+/[\w-]+@[0-9a-f]{40}  # v\d+\.\d+\.\d+", line), line


def test_workflows_call_what_the_repository_has():
    commands = [step["run"] for _, step in steps() if "run" in step]
    assert ".ci/run" in commands
    targets = [match for command in commands for match in re.findall(r"^make ([\w-]+)", command, re.MULTILINE)]
    assert {"test-fast", "docs", "build"} <= set(targets)
    assert all(re.search(rf"^{target}:", MAKEFILE, re.MULTILINE) for target in targets)


def test_ci_runs_both_ends_of_the_range():
    ran = (ROOT / ".ci" / "run").read_text().splitlines()
    assert {"make test", "make test-oldest", "make test-newest"} <= set(ran)


def test_a_bug_report_asks_for_the_environment():
    fields = {
        field["id"]: field for field in yaml.safe_load((GITHUB / "ISSUE_TEMPLATE" / "bug.yml").read_text())["body"]
    }
    assert "`luffy-trl env`" in fields["env"]["attributes"]["description"]
    assert fields["env"]["validations"]["required"]
    assert "env" in COMMANDS


# What assistants read


@pytest.mark.parametrize("name", ["AGENTS.md", "skills/luffy-trl/SKILL.md", "SECURITY.md"])
def test_it_names_only_what_is_there(name):
    text = (ROOT / name).read_text()
    for command in re.findall(r"luffy-trl ([a-z][a-z-]+)", text):
        assert command in COMMANDS, command
    for target in re.findall(r"\bmake ([a-z][\w-]+)", text):
        assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE), target
    for path in re.findall(r"[`(]((?:docs|src|tests|recipes|accelerate_configs|skills)/[\w./-]*)", text):
        assert (ROOT / path).exists(), path
    for module in re.findall(r"`(\w+\.py)`", text):
        assert (ROOT / "src" / "luffy_trl" / module).exists(), module


def test_the_skill_has_the_form_of_one():
    path = ROOT / "skills" / "luffy-trl" / "SKILL.md"
    _, front, body = path.read_text().split("---\n", 2)
    fields = yaml.safe_load(front)
    assert fields.keys() <= {"name", "description", "license", "compatibility", "metadata", "allowed-tools"}
    assert fields["name"] == path.parent.name
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", fields["name"])
    assert 0 < len(fields["description"]) <= 1024
    assert len(body.splitlines()) < 500
