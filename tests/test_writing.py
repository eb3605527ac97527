"""A run that is killed at any step while it replaces its output loses neither the old dataset nor the new one."""

import os
import signal
from pathlib import Path

import pytest
from filelock import FileLock

from luffy_trl.commands.cli import main
from luffy_trl.data.writing import DROPPED_FILE, all_or_nothing, check_output, finish_killed


# What the end of a run does on the file system
STEPS = [(Path, "rename"), (Path, "touch"), (os, "unlink"), (os, "rmdir")]


def write(directory: Path, text: str) -> None:
    with all_or_nothing(directory) as result:
        (result / DROPPED_FILE).write_text(text)


def killed_run(directory: Path, kill_at: int, text: str = "new") -> bool:
    """Writes a dataset in a process that is killed before its step of this number (from 0), if it has so many."""
    child = os.fork()
    if child == 0:
        try:
            with all_or_nothing(directory) as result:
                (result / DROPPED_FILE).write_text(text)
                if kill_at < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                count_down(kill_at)
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL)
    return status == signal.SIGKILL


def count_down(steps: int) -> None:
    """Replace, in this process, each step by one that first looks whether it is the last."""
    left = iter(range(steps, -1, -1))

    def counted(function):
        def step(*args, **kwargs):
            if next(left) == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return step

    for owner, name in STEPS:
        setattr(owner, name, counted(getattr(owner, name)))


def datasets_on_disk(folder: Path) -> set[str]:
    return {path.read_text() for path in folder.rglob(DROPPED_FILE)}


@pytest.mark.parametrize("name", ["out", "o[u]t*"])
@pytest.mark.parametrize("old", [True, False])
def test_a_kill_at_any_step_loses_nothing(tmp_path, old, name):
    seen = set()
    for step in range(1, 100):  # before the first one, which marks it as complete, it is not
        folder = tmp_path / str(step)
        directory = folder / name
        folder.mkdir()
        if old:
            write(directory, "old")
        if not killed_run(directory, step):
            break
        on_disk = datasets_on_disk(folder)
        assert "new" in on_disk
        was_there = (directory / DROPPED_FILE).read_text() if directory.exists() else None
        if old and was_there != "new":
            assert on_disk == {"old", "new"}

        said = finish_killed(directory)
        left = [path.name for path in folder.iterdir() if path != directory and any(path.iterdir())]
        now = (directory / DROPPED_FILE).read_text()
        seen.add((was_there, now))
        if was_there == "old":  # it stays, and where the new one is is said
            assert now == "old"
            assert len(said) == len(left) == 1
            assert left[0] in said[0]
            assert datasets_on_disk(folder) == {"old", "new"}
        else:
            assert now == "new"
            assert left == []
            assert len(said) == (was_there is None)
        assert finish_killed(directory) == (said if left else [])  # again, it does nothing
        write(directory, "newer")  # the next run
        assert (directory / DROPPED_FILE).read_text() == "newer"
    assert step > (5 if old else 4)
    assert seen == ({("old", "old"), (None, "new"), ("new", "new")} if old else {(None, "new"), ("new", "new")})


@pytest.mark.parametrize("step", [-1, 0])
def test_what_was_not_complete_is_removed(tmp_path, step):
    directory = tmp_path / "out"
    write(directory, "old")
    assert killed_run(directory, step, text="ne")
    assert datasets_on_disk(tmp_path) == {"old", "ne"}
    assert finish_killed(directory) == []
    assert datasets_on_disk(tmp_path) == {"old"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_run_under_way_is_left_alone(tmp_path):
    directory = tmp_path / "out"
    with all_or_nothing(directory) as result:
        (result / DROPPED_FILE).write_text("under way")
        assert finish_killed(directory) == []
        assert (result / DROPPED_FILE).read_text() == "under way"
    assert datasets_on_disk(tmp_path) == {"under way"}


def test_what_an_earlier_version_left_is_put_right(tmp_path):
    """It had no lock, and no mark of a complete dataset; the old one moved away last."""
    work = tmp_path / ".out.unfinished-abc"
    for part, text in {"replaced": "old", "result": "new"}.items():
        (work / part).mkdir(parents=True)
        (work / part / DROPPED_FILE).write_text(text)
    assert finish_killed(tmp_path / "out") == [
        f"{tmp_path / 'out'} holds the complete dataset of a run that was killed at its end."
    ]
    assert (tmp_path / "out" / DROPPED_FILE).read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("failing", [1, 2])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interruption_between_the_moves_loses_nothing(tmp_path, monkeypatch, failing, error):
    directory, rename, calls = tmp_path / "out", Path.rename, []
    write(directory, "old")

    def interrupted(self, target):
        calls.append(target)
        if len(calls) == failing:
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(error):
        write(directory, "new")
    assert datasets_on_disk(tmp_path) == {"old", "new"}
    assert (directory / DROPPED_FILE).read_text() == {1: "old", 2: "new"}[failing]


def test_the_command_puts_it_right_first(tmp_path, capsys):
    directory = tmp_path / "out"
    work = tmp_path / ".out.unfinished-abc"
    (work / "result").mkdir(parents=True)
    (work / "result" / DROPPED_FILE).write_text("new")
    for name in ("complete", "lock"):
        (work / name).touch()
    with FileLock(work / "lock"), pytest.raises(SystemExit):  # while it runs, nothing
        main(["prepare-data", str(tmp_path / "no.jsonl"), "--output_dir", str(directory), "--no_length"])
    assert not directory.exists()
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["prepare-data", str(tmp_path / "no.jsonl"), "--output_dir", str(directory), "--no_length"])
    out, err = capsys.readouterr()
    assert "holds the complete dataset of a run that was killed at its end" in out
    assert "is not empty. Choose another one, or replace it with --overwrite" in err
    check_output(directory, overwrite=True)
