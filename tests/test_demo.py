"""It learns: the demo itself, shortened, on one seed; and what it refuses."""

import json

import pytest
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer

from luffy_trl.commands.cli import main
from luffy_trl.commands.demo import READING, reading_of, run_demo
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
