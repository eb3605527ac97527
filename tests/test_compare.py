"""`luffy-trl compare`: methods of a table and of one's own, runs that go on, and a table that equals a recount."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from datasets import DatasetDict

from luffy_trl.commands.cli import main
from luffy_trl.commands.compare import Comparison, build_parser
from luffy_trl.comparing import ComparisonError
from luffy_trl.comparing.methods import Stage, chosen, known_methods
from luffy_trl.comparing.plan import Plan, PlannedRun
from luffy_trl.comparing.results import Measured, chosen_rates, table
from luffy_trl.config import LuffyConfig
from luffy_trl.runs.budget import StopAtTokens, counted
from luffy_trl.tasks.letter_walk import split_walks, to_dataset


ROOT = Path(__file__).parents[1]
RECIPE = {
    "per_device_train_batch_size": 16, "gradient_accumulation_steps": 2, "num_generations": 8, "max_steps": 5,
    "learning_rate": 1e-3, "reward_funcs": "letter_walk_reward", "max_completion_length": 12,
}  # fmt: skip


def plan(**changes) -> Plan:
    options = {"recipe": RECIPE, "base": "base", "output_dir": Path("out"), "token_budget": None}
    known = frozenset(
        {"per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "learning_rate", "token_budget"}
    )
    return Plan(**options | {"sft_fields": known} | changes)


def recipes(name: str, **changes) -> list[dict]:
    run = PlannedRun(name, known_methods()[name].stages, 3, changes.pop("rate", None), Path("run"))
    return [plan(**changes).stage_recipe(run, number) for number in range(len(run.stages))]


# What a method is


def test_every_method_of_the_table_differs_from_the_others():
    written = [json.dumps([[s.command, dict(s.fields), s.share] for s in m.stages]) for m in known_methods().values()]
    assert len(set(written)) == len(written) >= 10


def test_a_method_is_a_few_fields_over_the_recipe():
    [luffy], [on_policy] = recipes("luffy"), recipes("luffy_on_policy")
    assert on_policy == luffy | {"advantage_baseline": "on_policy"}
    assert luffy["seed"] == 3
    assert luffy["model_name_or_path"] == "base"
    assert recipes("luffy", rate=1e-4)[0]["learning_rate"] == 1e-4


@pytest.mark.parametrize("name", known_methods())
def test_every_method_goes_over_a_recipe_that_leaves_rows_out(name, tmp_path):
    for stage in known_methods()[name].stages:
        if stage.command == "train":
            fields = {"skip_zero_advantages": True, "use_cpu": True, "bf16": False, "output_dir": str(tmp_path)}
            LuffyConfig(**fields | {"per_device_train_batch_size": 8} | dict(stage.fields))


def test_sft_sees_a_demonstration_for_each_prompt_and_only_its_own_fields():
    [sft] = recipes("sft")
    # 32 rows are 4 prompts of 8
    assert sft["per_device_train_batch_size"] * sft["gradient_accumulation_steps"] == 4
    assert not {"num_generations", "reward_funcs", "max_completion_length"} & set(sft)


def test_stages_share_the_steps_and_hand_the_model_on():
    first, second = recipes("sft_then_rl")
    assert (first["max_steps"], second["max_steps"]) == (2, 3)
    assert second["model_name_or_path"] == first["output_dir"]
    first, second = recipes("sft_then_rl", token_budget=1000)
    assert first["token_budget"] == second["token_budget"] == 500


def test_an_adapter_is_merged_before_the_next_stage():
    first, second = recipes("sft_then_luffy", recipe=RECIPE | {"use_peft": True})
    assert Path(second["model_name_or_path"]) == Path(first["output_dir"]).with_name("merged")


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"max_steps": -1}, "max_steps must be in the recipe"),
        ({"max_steps": 1}, "no step is left for stage 1"),
        ({"per_device_train_batch_size": 2}, "less than a group of 8"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(recipe, message):
    with pytest.raises(ComparisonError, match=message):
        recipes("sft_then_rl", recipe=RECIPE | recipe)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "is no YAML"),
        ("[a]", "must hold a mapping"),
        ("a: {}", "must have a list of `stages`"),
        ("a: {stages: []}", "has no stage"),
        ("base: {stages: [{train: {}}]}", "and not 'base'"),
        ("a: {stages: [{grpo: {}}]}", "must be `train` or `sft`"),
        ("a: {stages: [{train: [1]}]}", "must hold fields"),
        ("a: {stages: [{train: {}, share: 2}]}", "share 2 must be above 0"),
        ("a: {stages: [{train: {}, share: 0.7}, {sft: {}, share: 0.7}]}", "add up to 1.4"),
        ("a: {stages: [{train: {}, share: 0.5}]}", "add up to 0.5, expected 1"),
    ],
)
def test_a_file_of_methods_that_is_none_is_named(tmp_path, text, message):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ComparisonError, match=f"mine.yaml.*{message}"):
        known_methods(tmp_path / "mine.yaml")


def test_names_are_looked_up_in_both_tables(tmp_path):
    (tmp_path / "mine.yaml").write_text("mine: {stages: [{train: {shaping: log}}]}")
    methods = known_methods(tmp_path / "mine.yaml")
    assert [m.name for m in chosen(["base", "mine", "grpo", "mine"], methods)] == ["mine", "grpo"]
    assert methods["mine"].stages == (Stage("train", {"shaping": "log"}, 1.0),)
    with pytest.raises(ComparisonError, match=r"--methods dpo: there is no such method\. There are grpo"):
        chosen(["dpo"], methods)


# What comes out


def test_a_rate_is_chosen_by_the_mean_and_the_smallest_of_equals():
    scores = {
        "a": {1e-5: (0.1, 0.3), 1e-4: (0.5, 0.5), 1e-3: (0.4, 0.605)},
        "b": {1e-5: (0, 0), 1e-4: (0, 0), 1e-3: (0, 0)},
    }
    results = [
        Measured(method, seed, rate, accuracy={"held_out": score})
        for method, rates in scores.items()
        for rate, of_seeds in rates.items()
        for seed, score in enumerate(of_seeds)
    ]
    assert chosen_rates(results, "held_out") == {"a": 1e-4, "b": 1e-4}


def test_the_table_has_mean_and_deviation_over_seeds():
    [grpo] = chosen(["grpo"], known_methods())
    results = [Measured("base", 0, None, {"t": 0.5}, {"t": 0.25})]
    results += [Measured("grpo", s, None, {"t": a}, {"t": 0.5}, 1.5, 10, 3) for s, a in ((0, 0.5), (1, 0.7))]
    header, base, row = table(results, [grpo], ["t"], ["sampled", "greedy"])
    assert header == ["method", "seeds", "t, sampled", "t, greedy", "entropy", "tokens", "seconds"]
    assert base == ["base", "1", "50.0", "25.0", "-", "-", "-"]
    assert row == ["GRPO", "2", "60.0 ± 14.1", "50.0 ± 0.0", "1.50", "10", "3"]


# Tokens


def test_tokens_are_counted_over_resumptions():
    assert counted([]) == 0
    assert counted([10, 20, 30]) == 30
    assert counted([10, 20, 5, 12, 3]) == 35


def test_a_run_ends_with_its_token_budget(make_trainer, walks):
    trainer = make_trainer(max_steps=20, token_budget=500)
    trainer.train()
    seen = [log["num_tokens"] for log in trainer.state.log_history if "num_tokens" in log]
    assert seen[-2] < 500 <= seen[-1]
    assert trainer.state.global_step == len(seen) < 20


def test_what_was_seen_before_a_resumption_counts():
    class State:
        log_history = [{"num_tokens": 400.0}, {"loss": 1.0}]
        num_input_tokens_seen = 0

    class Control:
        should_training_stop = False

    metrics = {"num_tokens": [99.0]}
    callback = StopAtTokens(metrics, 500)
    callback.on_train_begin(None, State, Control)
    callback.on_step_end(None, State, Control)
    assert not Control.should_training_stop
    metrics["num_tokens"].append(100.0)
    callback.on_step_end(None, State, Control)
    assert Control.should_training_stop


# The command


@pytest.fixture(scope="module")
def files(tmp_path_factory, tiny_model_dir):
    directory = tmp_path_factory.mktemp("compare")
    walks = split_walks(train_size=16, test_size=8, length=4)
    DatasetDict({split: to_dataset(of_split) for split, of_split in walks.items()}).save_to_disk(
        str(directory / "data")
    )
    recipe = {
        "model_name_or_path": str(tiny_model_dir), "dataset_name": str(directory / "data"),
        "reward_funcs": ["letter_walk_reward"], "num_generations": 4, "per_device_train_batch_size": 8,
        "max_completion_length": 12, "max_steps": 2, "logging_steps": 1, "learning_rate": 1e-3, "use_cpu": True,
        "bf16": False, "report_to": "none", "save_strategy": "no",
    }  # fmt: skip
    (directory / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return directory


def command(files, out, *more) -> list[str]:
    flags = f"--config {files / 'recipe.yaml'} --output_dir {out} --workers 2".split()
    return ["compare", *flags, *more]


def test_the_command_of_the_docs_is_taken(files, tmp_path):
    """Up to the first run: with this tiny model's recipe."""
    page = (ROOT / "docs" / "compare.md").read_text()
    [block] = re.findall(r"```bash\n(luffy-trl compare .*?)```", page, flags=re.DOTALL)
    argv = shlex.split(block.replace("\\\n", " "))[2:]
    args, overrides = build_parser("compare").parse_known_args([*argv, "--output_dir", str(tmp_path)])
    args.config = files / "recipe.yaml"
    comparison = Comparison(args, overrides)
    assert [method.name for method in comparison.methods] == ["grpo", "luffy", "sft", "sft_then_rl"]
    assert len(comparison.plan.runs(comparison.methods, args.seeds, {})) == 1 + 4 * 2


def test_methods_of_the_docs_are_read(tmp_path):
    page = (ROOT / "docs" / "compare.md").read_text()
    [block] = re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)
    (tmp_path / "mine.yaml").write_text(block)
    mine = known_methods(tmp_path / "mine.yaml")
    assert mine["small_gamma"].stages == (Stage("train", {"shaping_gamma": 0.01}, 1.0),)
    assert [stage.share for stage in mine["short_sft_then_luffy"].stages] == [0.2, 0.8]
    assert set(re.findall(r"`(\w+)`", page.split("## Methods")[1].split("Your own")[0])) == set(known_methods())


@pytest.mark.slow
def test_a_comparison_is_killed_goes_on_and_its_table_is_a_recount(files, tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("mine: {label: Mine, stages: [{train: {shaping: log}}]}")
    methods = ["--methods", "sft_then_rl", "mine", "--methods_file", str(tmp_path / "mine.yaml")]
    arguments = command(files, tmp_path / "out", *methods, "--answers", "sampled", "--n_samples", "2")
    process = subprocess.Popen([sys.executable, "-m", "luffy_trl", *arguments], start_new_session=True)
    runs = tmp_path / "out" / "runs"
    deadline = time.monotonic() + 300
    while not list(runs.glob("*/seed-0/stage-1-*/done.json")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = {path: path.stat().st_mtime_ns for path in runs.rglob("done.json")}

    main(arguments)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in done.items())  # not done again
    out = capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "results.json").read_text())["runs"]
    assert [one["method"] for one in results] == ["base", "sft_then_rl", "mine"]
    for one in results:
        seed = () if one["method"] == "base" else ("seed-0",)
        samples = runs.joinpath(one["method"], *seed, "evaluations", "held_out-sampled", "results", "samples")
        scores = [json.loads(line)["score"] for path in samples.glob("*.jsonl") for line in path.open()]
        assert len(scores) == 8 * 2
        assert one["accuracy"]["held_out"] == pytest.approx(sum(scores) / len(scores))
    assert [one["steps"] for one in results] == [0, 2, 2]
    assert all(one["tokens"] > 0 and one["seconds"] > 0 for one in results[1:])
    assert "Mine" in out
    assert (tmp_path / "out" / "report" / "report.html").is_file()
    assert yaml.safe_load((runs / "mine" / "seed-0" / "stage-1-train" / "recipe.yaml").read_text())["shaping"] == "log"

    with pytest.raises(SystemExit):
        main([*arguments, "--max_steps", "4"])
    assert "was made with other settings (max_steps)" in capsys.readouterr().err


def test_a_recipe_is_taken_as_it_was_written(files, tmp_path):
    """`no` is a strategy, and no truth; a base recipe's fields come along."""
    text = (files / "recipe.yaml").read_text().replace("save_strategy: 'no'", "save_strategy: no")
    assert "save_strategy: no\n" in text
    (tmp_path / "recipe.yaml").write_text(text)
    flags = ["--config", str(tmp_path / "recipe.yaml"), "--methods", "luffy", "--output_dir", str(tmp_path)]
    args, overrides = build_parser("compare").parse_known_args([*flags, "--eval_strategy", "no", "--max_steps", "3"])
    comparison = Comparison(args, overrides)
    [_, run] = comparison.plan.runs(comparison.methods, [0], {})
    recipe = comparison.plan.stage_recipe(run, 0)
    assert (recipe["save_strategy"], recipe["eval_strategy"], recipe["max_steps"]) == ("no", "no", 3)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--methods", "luffy", "--hub_token", "hf_secret"], "hub_token: recipes are written down"),
        (["--methods", "luffy", "--num_generations", "["], "--num_generations: "),
        (["--methods", "dpo"], "--methods dpo: there is no such method"),
        (
            ["--methods", "luffy", "--shapping", "log"],
            "luffy, stage 1: there is no field shapping. Did you mean shaping?",
        ),
        (["--methods", "luffy", "--num_generations", "many"], "luffy, stage 1: num_generations"),
        (["--methods", "luffy", "--reward_funcs", "no_reward"], "no_reward: no such reward function"),
        (["--methods", "luffy", "--learning_rates", "1e-3"], "--learning_rates and --rate_seeds belong together"),
        (["--methods", "luffy", "--learning_rates", "1e-3", "--rate_seeds", "0"], "--rate_seeds 0 is one of --seeds"),
        (["--methods", "luffy", "--test_sets", "harder"], "--test_sets harder: write a name and a dataset"),
        (
            ["--methods", "luffy", "--accelerate_config", "no.yaml"],
            "--accelerate_config no.yaml: there is no such file",
        ),
        (["--methods", "luffy", "--token_budget", "0"], "--token_budget 0 must be 1 or more"),
        (["--methods", "luffy", "stray"], "there is no such method"),
    ],
)
def test_what_cannot_be_compared_is_one_sentence_before_anything_runs(files, tmp_path, capsys, more, message):
    with pytest.raises(SystemExit) as stop:
        main(command(files, tmp_path / "out", *more))
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out" / "runs").exists()
