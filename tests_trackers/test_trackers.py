"""Training that reports to Trackio, W&B (offline) and TensorBoard, and what each has kept: `make test-trackers`."""

import json
import os
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record

from luffy_trl.tasks.letter_walk import build_tokenizer
from tests.conftest import SMALL_RUN, save_tiny_qwen2


STEPS = 3
METRICS = ("on_policy/reward", "off_policy/prob", "groups/solve_none")
PICTURES = {"reward", "entropy", "probability", "length", "groups", "cold_start"}
PICTURES |= {"clip", "loss", "fraction", "grad_norm", "time"}
BLOCK, HEADER = 32768, struct.Struct("<IHB")  # of W&B's files, which are logs as LevelDB writes them


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Of one run that reports to all three."""
    folder = tmp_path_factory.mktemp("trackers")
    save_tiny_qwen2(folder / "model", build_tokenizer(), max_position_embeddings=128, initializer_range=0.2)
    recipe = SMALL_RUN | {
        "model_name_or_path": "model", "dataset_name": "letter_walk", "output_dir": "out", "max_steps": STEPS,
        "save_strategy": "no", "disable_tqdm": True, "log_completions": True, "num_completions_to_print": 0,
        "report_to": ["trackio", "wandb", "tensorboard"], "project": "walks", "run_name": "first",
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    environment = os.environ | {
        "TRACKIO_DIR": str(folder / "trackio"),
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
    }
    command = [sys.executable, "-m", "luffy_trl", "train", "--config", "recipe.yaml"]
    result = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


@pytest.fixture(scope="module")
def logged(folder) -> dict[str, list[float]]:
    """What the trainer itself has logged, step by step."""
    lines = json.loads((folder / "out" / "trainer_state.json").read_text())["log_history"]
    return {metric: [line[metric] for line in lines if metric in line] for metric in METRICS}


def check_completions(rows: list[dict[str, Any]]):
    """Two groups of four, a demonstration in each, which the reward calls right."""
    assert [row["demonstration"] for row in rows].count(True) == 2
    assert len(rows) == SMALL_RUN["per_device_train_batch_size"]
    for row in rows:
        assert row["letter_walk_reward"] == row["demonstration"]
        assert row["advantage"] == pytest.approx(row["demonstration"] - 1 / 4)


def is_drawn(path: Path) -> bool:
    with Image.open(path) as picture:
        return picture.size == (550, 352)


def test_trackio_has_metrics_completions_and_pictures(folder, logged):
    with sqlite3.connect(folder / "trackio" / "walks.db") as database:
        rows = database.execute("SELECT run_name, metrics FROM metrics ORDER BY id").fetchall()
    assert {name for name, _ in rows} == {"first"}
    lines = [json.loads(metrics) for _, metrics in rows]
    for metric in METRICS:
        assert [line[f"train/{metric}"] for line in lines if f"train/{metric}" in line] == logged[metric]
    tables = [line["completions"]["_value"] for line in lines if "completions" in line]
    assert [table[0]["step"] for table in tables][:STEPS] == [1, 2, 3]
    for table in tables:
        check_completions(table)
    pictures = {key: value for line in lines for key, value in line.items() if key.startswith("report/")}
    assert {key.removeprefix("report/") for key in pictures} == PICTURES
    assert all(is_drawn(folder / "trackio" / "media" / value["file_path"]) for value in pictures.values())


def records(path: Path) -> Iterator[Record]:
    """A W&B file's records: each in one piece (type 1), or in a first, middle and last one (2, 3, 4)."""
    data, at, parts = path.read_bytes(), 7, b""
    assert data.startswith(b":W&B")
    while at < len(data):
        if BLOCK - at % BLOCK < HEADER.size:  # no room for a header: zeros to the end of the block
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = HEADER.unpack_from(data, at)
        parts += data[at + HEADER.size : at + HEADER.size + length]
        at += HEADER.size + length
        if kind in (1, 4):
            yield Record.FromString(parts)
            parts = b""


def test_wandb_has_metrics_completions_and_pictures(folder, logged):
    [path] = folder.glob("wandb/offline-run-*/run-*.wandb")
    found = list(records(path))
    assert [record.run.display_name for record in found if record.run.display_name][:1] == ["first"]
    lines = [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in found
        if record.history.item
    ]
    for metric in METRICS:
        assert [line[f"train/{metric}"] for line in lines if f"train/{metric}" in line] == logged[metric]
    tables = [line["completions/path"] for line in lines if "completions/path" in line]
    assert len(tables) >= STEPS
    for name in tables:
        table = json.loads((path.parent / "files" / name).read_text())
        check_completions([dict(zip(table["columns"], row, strict=True)) for row in table["data"]])
    pictures = {name: line[f"report/{name}/path"] for line in lines for name in PICTURES if "report/loss/path" in line}
    assert all(is_drawn(path.parent / "files" / pictures[name]) for name in PICTURES)


def test_tensorboard_has_metrics_and_pictures(folder, logged):
    [directory] = (folder / "out" / "runs").iterdir()
    events = EventAccumulator(str(directory), size_guidance={"images": 0, "scalars": 0}).Reload()
    for metric in METRICS:
        assert [event.value for event in events.Scalars(f"train/{metric}")] == pytest.approx(logged[metric])
    assert {tag.removeprefix("report/") for tag in events.Tags()["images"]} == PICTURES
    [picture] = events.Images("report/reward")
    assert (picture.step, picture.width, picture.height) == (STEPS, 550, 352)
