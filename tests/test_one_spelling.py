"""Flags have one spelling, TRL's, in help, messages and pages; both spellings are understood everywhere."""

import re
from pathlib import Path

import pytest

from luffy_trl.commands import eval as eval_command
from luffy_trl.commands import prepare_data
from luffy_trl.commands.cli import COMMANDS, main, underscored


ROOT = Path(__file__).parents[1]
HYPHENED = re.compile(r"(?<![\w-])--[a-z]+(?:-[a-z]+)+")


def test_names_of_flags_are_normalised_and_values_stay():
    given = ["--max-rows", "3", "--system-prompt=a-b --c-d", "-x-y", "a-b", "--no-such_flag", "--3-4", "--", "--a-b"]
    assert underscored(given) == [
        "--max_rows", "3", "--system_prompt=a-b --c-d", "-x-y", "a-b", "--no_such_flag", "--3-4", "--", "--a-b",
    ]  # fmt: skip
    assert underscored(["--config=my-recipe.yaml", "--output-dir", "my-dir"]) == [
        "--config=my-recipe.yaml", "--output_dir", "my-dir",
    ]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_underscores(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    assert set(HYPHENED.findall(capsys.readouterr().out)) <= {"--no-build-isolation"}  # of pip


@pytest.mark.parametrize(
    "flag", ["--no-such-flag", "--no_such_flag", "--no-such_flag=3"], ids=["hyphens", "underscores", "both"]
)
@pytest.mark.parametrize("command", COMMANDS)
def test_messages_show_underscores(command, flag, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([command, flag])
    assert exit_.value.code == 2
    assert HYPHENED.findall(capsys.readouterr().err) == []


@pytest.mark.parametrize("spelling", [str, lambda flag: flag.replace("_", "-")], ids=["underscores", "hyphens"])
def test_both_spellings_are_the_same_flag(spelling, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    flags = [spelling("--output_dir"), str(tmp_path / "out"), spelling("--no_length"), f"{spelling('--max_rows')}=3"]
    with pytest.raises(SystemExit):
        main(["prepare-data", "no.jsonl", *flags])
    assert f"--output_dir {tmp_path / 'out'} holds mine.txt" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["eval", "--model", "m", spelling("--output_dir"), "o", spelling("--n_samples"), "0"])
    assert "--n_samples 0 must be 1 or more" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["train", spelling("--dataset_name"), "no.jsonl", spelling("--use_cpu"), spelling("--output_dir"), "o"])
    assert "--model_name_or_path is missing" in capsys.readouterr().err


@pytest.mark.parametrize("page", [ROOT / "README.md", *(ROOT / "docs").glob("*.md")], ids=lambda page: page.name)
def test_pages_show_underscores(page):
    parsers = [prepare_data.build_parser("p"), eval_command.build_parser("e")]
    ours = {option for parser in parsers for action in parser._actions for option in action.option_strings}
    assert len(ours) > 40
    assert not {
        flag for flag in HYPHENED.findall(page.read_text()) if flag.replace("-", "_").replace("__", "--", 1) in ours
    }
