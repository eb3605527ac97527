"""`luffy-trl eval --push_to_hub`: leaderboards of the Hub and the card's metadata, on a local Hub."""

import io
import json
import os
import subprocess
import sys
from argparse import Namespace
from datetime import UTC, datetime, timedelta

import pandas as pd
import pytest
import yaml
from huggingface_hub import HfApi, ModelCard, constants, parse_eval_result_entries

from luffy_trl.commands.cli import main
from luffy_trl.evaluation import EvaluationError
from luffy_trl.evaluation.publishing import Publisher
from luffy_trl.hub.errors import PushError

from .conftest import HUNG
from .hub_server import TOKEN, HubServer, Repo
from .test_train_script import build_text_model


SUMMARY = {"score": 0.412345, "stderr": 0.01, "problems": 198, "samples": 1}
GPQA = "tasks: [{id: gpqa_main, config: gpqa_main, split: train}, {id: diamond, config: gpqa_diamond, split: train}]"
MMLU_PRO = "name: MMLU-Pro\ntasks:\n  - id: mmlu_pro\n"


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with HubServer() as server:
        model = server.repos["model", "me/model"] = Repo()
        model.commit("main", {"config.json": b"{}"}, "a model")
        yield server


def add_benchmark(hub: HubServer, name: str, files: dict[str, bytes]) -> None:
    repo = hub.repos["dataset", name] = Repo()
    repo.commit("main", files, "a dataset")


@pytest.fixture
def publisher(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))

    def make(tasks: dict[str, dict] | None = None, **options) -> Publisher:
        tasks = {"luffy_gpqa_diamond": SUMMARY} if tasks is None else tasks
        (tmp_path / "results.json").write_text(json.dumps({"tasks": tasks}))
        args = Namespace(
            model="me/model", push_to_hub="", output_dir=str(tmp_path), limit=None, data_files=None, dataset_name=None,
            temperature=0.6, max_new_tokens=8192,
        )  # fmt: skip
        vars(args).update(options)
        return Publisher(args, HfApi(endpoint=hub.url, token=TOKEN))

    return make


def files(hub: HubServer) -> dict[str, bytes]:
    return hub.repos["model", "me/model"].at()


def test_a_benchmark_of_the_hub_goes_to_its_leaderboard(hub, publisher):
    add_benchmark(hub, "Idavidrein/gpqa", {"eval.yaml": GPQA.encode()})
    add_benchmark(hub, "TIGER-Lab/MMLU-Pro", {"eval.yaml": MMLU_PRO.encode()})
    add_benchmark(hub, "HuggingFaceH4/MATH-500", {"README.md": b"# no benchmark"})
    tasks = ("luffy_gpqa_diamond", "luffy_mmlu_pro", "luffy_math500")
    said = publisher(dict.fromkeys(tasks, SUMMARY)).publish()
    assert said.startswith(f"Published to {hub.url}/me/model. In its card: 3 result(s); in .eval_results/, for")
    assert said.endswith(" luffy_gpqa_diamond, luffy_mmlu_pro.")

    written = {name: content for name, content in files(hub).items() if name.startswith(".eval_results/")}
    assert set(written) == {".eval_results/luffy_gpqa_diamond.yaml", ".eval_results/luffy_mmlu_pro.yaml"}
    [gpqa] = parse_eval_result_entries(yaml.safe_load(written[".eval_results/luffy_gpqa_diamond.yaml"]))
    assert (gpqa.dataset_id, gpqa.task_id, gpqa.value) == ("Idavidrein/gpqa", "diamond", 41.23)
    assert "mean of 1 samples a problem; temperature 0.6, at most 8192 new tokens; luffy_trl " in gpqa.notes
    assert datetime.now(UTC) - datetime.fromisoformat(gpqa.date) < timedelta(minutes=5)
    [mmlu_pro] = parse_eval_result_entries(yaml.safe_load(written[".eval_results/luffy_mmlu_pro.yaml"]))
    assert (mmlu_pro.dataset_id, mmlu_pro.task_id) == ("TIGER-Lab/MMLU-Pro", "mmlu_pro")

    card = ModelCard(files(hub)["README.md"].decode())
    assert {entry.dataset_type: entry.metric_value for entry in card.data.eval_results} == dict.fromkeys(tasks, 41.23)
    assert files(hub)["config.json"] == b"{}"


@pytest.mark.parametrize("options", [{"limit": 3}, {"data_files": ["problems.jsonl"]}, {"dataset_name": "mine.jsonl"}])
def test_a_part_and_problems_of_ones_own_are_no_benchmark(options, hub, publisher):
    add_benchmark(hub, "Idavidrein/gpqa", {"eval.yaml": GPQA.encode()})
    assert (
        "for leaderboards: none, since no benchmark of the Hub was evaluated as a whole"
        in publisher(**options).publish()
    )
    assert set(files(hub)) == {"config.json", "README.md"}


@pytest.mark.parametrize(
    "content", ["", "[", "tasks: 3", "tasks: [3]", "tasks: [{config: gpqa_diamond, split: train}]", "[" * 100_000]
)
def test_a_benchmark_that_cannot_be_read_costs_its_leaderboard_alone(content, hub, publisher):
    add_benchmark(hub, "Idavidrein/gpqa", {"eval.yaml": content.encode()})
    said: list[str] = []
    assert "In its card: 1 result(s)" in publisher().publish(said.append)
    [note] = said
    assert note == "Note: the eval.yaml of Idavidrein/gpqa cannot be read, so no result goes to its leaderboard."


def test_other_results_and_words_of_the_card_stay(hub, publisher):
    publisher({"luffy_aime24": SUMMARY, "luffy_amc": SUMMARY}).publish()
    card = ModelCard(files(hub)["README.md"].decode())
    card.data["license"] = "mit"
    repo = hub.repos["model", "me/model"]
    repo.commit("main", files(hub) | {"README.md": str(card).encode() + b"\nMy words.\n"}, "words")
    publisher({"luffy_amc": SUMMARY | {"score": 0.5}}).publish()
    card = ModelCard(files(hub)["README.md"].decode())
    assert {entry.dataset_type: entry.metric_value for entry in card.data.eval_results} == {
        "luffy_aime24": 41.23,
        "luffy_amc": 50.0,
    }
    assert card.data.license == "mit"
    assert "My words." in card.text


def test_a_card_that_cannot_be_read_is_not_lost(hub, publisher):
    hub.repos["model", "me/model"].commit("main", {"README.md": b"---\n- a list\n---\nMy words."}, "words")
    with pytest.raises(PushError, match=r"the README.md of me/model cannot be read: .*\. Mend it first$"):
        publisher().publish()
    assert b"My words." in files(hub)["README.md"]


@pytest.mark.parametrize(("status", "reason"), [(503, "the Hub answered 503"), (None, "no connection to the Hub")])
def test_a_fault_that_passes_is_tried_again(status, reason, hub, publisher, monkeypatch):
    monkeypatch.setattr("luffy_trl.evaluation.publishing.time.sleep", lambda seconds: None)
    hub.fault("commit", status=status, times=1)
    said: list[str] = []
    assert publisher().publish(said.append).startswith("Published")
    assert any(reason in line and "Trying again" in line for line in said)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"push_to_hub": "me/other"}, "--push_to_hub me/other: the Hub answered 404"),
        ({"push_to_hub": "a/b/c"}, "--push_to_hub a/b/c is no repository's name: OWNER/NAME."),
        ({"model": "."}, "--push_to_hub needs the model's repository on the Hub, since --model . is a directory here"),
    ],
)
def test_a_wrong_repository_is_said_before_anything_is_evaluated(options, message, publisher):
    with pytest.raises(EvaluationError, match=f"^{message}"):
        publisher(**options)


def test_a_refused_token_is_said_before_anything_is_evaluated(hub, publisher):
    hub.fault("whoami", status=401)
    with pytest.raises(EvaluationError, match=r"^--push_to_hub me/model: the Hub refused the token \(401\)"):
        publisher()


def test_without_a_token_it_is_refused(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    hub.needs_token = False
    args = Namespace(
        model="me/model", push_to_hub="", output_dir=str(tmp_path), limit=None, data_files=None, dataset_name=None
    )
    with pytest.raises(EvaluationError, match=r"^--push_to_hub me/model: there is no token here\. Log in with"):
        Publisher(args, HfApi(endpoint=hub.url))


def test_offline_it_is_refused_in_one_sentence(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["eval", "--model", "me/model", "--output_dir", str(tmp_path), "--push_to_hub"])
    assert ended.value.code == 2
    assert "--push_to_hub me/model: HF_HUB_OFFLINE is set" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_an_evaluation_on_a_dataset_of_the_hub_is_published(hub, tmp_path):
    """From the command line: the dataset comes from the Hub; what was refused is published by a second call."""
    build_text_model(["What is 1 + 1? The answer is \\boxed{2}."] * 4, tmp_path / "model")
    table = io.BytesIO()
    pd.DataFrame({"problem": ["What is 1 + 1?"], "answer": ["2"]}).to_parquet(table)
    rows = {"data/train-00000-of-00001.parquet": table.getvalue(), "eval.yaml": b"tasks: [{id: aime, split: train}]"}
    add_benchmark(hub, "HuggingFaceH4/aime_2024", rows)
    command = [
        sys.executable, "-m", "luffy_trl", "eval", "--model", "model", "--output_dir", "out",
        "--tasks", "luffy_aime24", "--n_samples", "2", "--max_new_tokens", "8", "--device", "cpu",
        "--push_to_hub", "me/model",
    ]  # fmt: skip
    environment = os.environ | hub.environment() | {"HF_HOME": str(tmp_path / "home")}

    def evaluate() -> subprocess.CompletedProcess:
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=HUNG, check=False
        )

    hub.fault("commit", status=400)
    refused = evaluate()
    assert refused.returncode == 1, refused.stderr
    assert "but not on the Hub: the Hub answered 400" in refused.stderr.splitlines()[-1]
    hub.faults.clear()
    published = evaluate()
    assert published.returncode == 0, published.stderr
    assert "2 of 2 samples are kept" in published.stdout
    [entry] = parse_eval_result_entries(yaml.safe_load(files(hub)[".eval_results/luffy_aime24.yaml"]))
    assert (entry.dataset_id, entry.task_id) == ("HuggingFaceH4/aime_2024", "aime")
    score = json.loads((tmp_path / "out" / "results.json").read_text())["tasks"]["luffy_aime24"]["score"]
    assert entry.value == round(100 * score, 2)
    assert all(TOKEN not in text for run in (refused, published) for text in (run.stdout, run.stderr))
    assert all(TOKEN.encode() not in content for content in hub.contents())
