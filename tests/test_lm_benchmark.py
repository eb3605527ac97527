"""The benchmarks of a real model and of the cold start: their plans, and that pages show what results files hold."""

import json
import shutil
from pathlib import Path

import pytest

from luffy_trl.comparing.methods import known_methods
from luffy_trl.tasks.letter_walk import LETTERS
from luffy_trl.tasks.letter_walk_base import PretrainingRows


ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture
def lm():
    import lm

    return lm


def run(method: str, seed: int, sums: float, *, regime="warm", rate=3e-5, chooses_rate=False, cpu_seconds=600.0):
    shares = {"held_out": sums, "longer_sums": sums / 2, "reversal": 0.25}
    return {
        "regime": regime, "method": method, "seed": seed, "chooses_rate": chooses_rate, "learning_rate": rate,
        "accuracy": shares, "entropy": 0.5, "tokens": 20_000, "cpu_seconds": cpu_seconds,
        "text_nll": 3.0,
    }  # fmt: skip


def test_a_real_models_runs_are_all_different_and_rates_have_a_seed_of_their_own(lm):
    jobs = lm.jobs(lm.SEEDS)
    assert len({job.name for job in jobs}) == len(jobs)
    assert not {job.seed for job in jobs if job.rate is not None} & {
        job.seed for job in jobs if job.rate is None and job.method != "base"
    }
    measured = {job.method for job in jobs if job.rate is None} - {"base"}
    assert measured - set(lm.LONG) <= set(known_methods())
    for method in measured:
        for regime in ("cold",) if method == "luffy_log" else lm.TUNED:
            assert [job.seed for job in jobs if (job.regime, job.method, job.rate) == (regime, method, None)] == [0, 1]


def test_a_method_without_rates_of_its_own_takes_the_rate_of_its_kind(lm, tmp_path):
    path = tmp_path / "results.json"
    trials = [run(m, 7, 0.5, rate=r, chooses_rate=True) for m, r in (("luffy", 1e-5), ("sft", 3e-5), ("grpo", 1e-4))]
    path.write_text(json.dumps({"runs": trials}))
    rates = {method: lm.Results(path).rate(lm.Job("warm", method, 0)) for method in ("prefix", "rl_sft", "grpo")}
    assert rates == {"prefix": 1e-5, "rl_sft": 3e-5, "grpo": 1e-4}


def test_a_second_warm_base_has_the_main_methods_at_one_rate(lm, tmp_path):
    jobs = [job for job in lm.jobs(lm.SEEDS) if job.regime == "warm2"]
    assert jobs[0] == lm.Job("warm2", "base", 0)
    assert {job.method for job in jobs[1:]} == {"sft", "luffy", "sft_then_rl", "grpo", *lm.LONG}
    assert len(jobs) == 1 + 2 * 6
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"runs": [run("sft", 7, 0.5, rate=3e-5, chooses_rate=True)]}))
    results = lm.Results(path)
    assert {results.rate(job) for job in jobs[1:]} == {1e-5}
    assert results.rate(jobs[0]) is None


def test_a_method_of_as_many_seconds_has_as_many_more_steps(lm, tmp_path):
    path = tmp_path / "results.json"
    trials = [("luffy", 600.0), ("luffy", 500.0), ("sft", 60.0), ("sft", 50.0)]
    path.write_text(json.dumps({"runs": [run(m, 7, 0.1, chooses_rate=True, cpu_seconds=s) for m, s in trials]}))
    results = lm.Results(path)
    of = {method: lm.Job("warm", method, 0) for method in ("luffy", "sft", "sft_long")}
    assert results.steps(of["sft_long"], 20) == 200
    assert results.steps(of["sft"], 20) == results.steps(of["luffy"], 20) == 20
    assert results.rate(of["sft_long"]) == results.rate(of["sft"])


def test_the_tables_of_a_real_model_are_means_over_its_seeds():
    from lm_report import short_table, table

    runs = [run("base", 0, 0.125), run("luffy", 0, 0.25), run("luffy", 1, 0.5), run("sft", 0, 0.75)]
    runs += [run("luffy", 7, 1.0, chooses_rate=True), run("luffy", 0, 0.0, regime="cold")]
    lines = table(runs, "warm").splitlines()[2:]
    assert [line.split(" | ")[0] for line in lines] == ["| base", "| SFT", "| LUFFY"]
    assert lines[2].startswith("| LUFFY | 2 | 3e-05 | 38 ± 18 | 19 ± 9 | 25 ± 0 | 3.00 ± 0.00 |")
    assert short_table(runs).splitlines()[-1] == "| LUFFY | 38 ± 18 | 19 ± 9 | 25 ± 0 | 0 | 0 | 600 ± 0 |"


def test_rates_are_shown_for_each_base():
    from lm_report import trials

    runs = [run("luffy", 0, 0.9)]  # chooses none
    for regime, rate, sums in (("warm", 1e-5, 0.25), ("warm", 3e-5, 0.5), ("cold", 3e-5, 0.125)):
        runs.append(run("luffy", 7, sums, regime=regime, rate=rate, chooses_rate=True))
    assert trials(runs).splitlines()[2:] == ["| LUFFY, warm | 25 | 50 |", "| LUFFY, cold | - | 12 |"]


def test_pages_show_what_the_results_of_a_real_model_say(lm, tmp_path):
    docs, readme = copies(tmp_path, "learning.md")
    lm.main(["--report", "--docs", str(docs), "--readme", str(readme)])
    assert (docs / "learning.md").read_text() == (ROOT / "docs" / "learning.md").read_text()
    assert readme.read_text() == (ROOT / "README.md").read_text()


def test_the_page_shows_what_the_results_of_the_cold_start_say(tmp_path):
    from cold_start import report

    docs, _ = copies(tmp_path, "method.md")
    report(json.loads((RESULTS / "cold_start_cpu.json").read_text())["runs"], docs)
    assert (docs / "method.md").read_text() == (ROOT / "docs" / "method.md").read_text()


def test_a_base_that_babbles_writes_letters_at_random_and_no_answer(tokenizer):
    rows = iter(PretrainingRows(tokenizer, 0, babble=True))
    letters = []
    while len(letters) < 2000:
        row = next(rows)
        target = tokenizer.decode([label for label in row["labels"] if label >= 0], skip_special_tokens=True)
        if tokenizer.decode(row["input_ids"]).startswith("D"):
            assert "#" not in target
            letters += target.split(";")
    assert set(letters) == set(LETTERS)
    assert max(map(letters.count, LETTERS)) < 2 * len(letters) / len(LETTERS)


def copies(tmp_path: Path, page: str) -> tuple[Path, Path]:
    docs, readme = tmp_path / "docs", tmp_path / "README.md"
    docs.mkdir()
    shutil.copy(ROOT / "docs" / page, docs)
    shutil.copy(ROOT / "README.md", readme)
    return docs, readme
