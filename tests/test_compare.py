"""`luffy-trl compare`: methods of a table and of one's own, runs that go on, and a table that equals a recount."""

import datetime
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from datasets import Dataset, DatasetDict, load_from_disk
from transformers import AutoTokenizer

from luffy_trl.commands.cli import main
from luffy_trl.commands.compare import Comparison, build_parser
from luffy_trl.commands.eval import build_parser as eval_parser
from luffy_trl.comparing import ComparisonError
from luffy_trl.comparing.methods import Stage, chosen, known_methods, stage_steps
from luffy_trl.comparing.plan import Plan, PlannedRun
from luffy_trl.comparing.plan import TestSet as ProblemSet
from luffy_trl.comparing.results import Measured, chosen_rates, table
from luffy_trl.comparing.stages import LAUNCHER, Commands, Processes, StageError
from luffy_trl.comparing.steps import Step
from luffy_trl.config import LuffyConfig
from luffy_trl.evaluation.loading import parse_model_args
from luffy_trl.runs.fingerprints import data_fingerprint
from luffy_trl.tasks.letter_walk import split_walks, to_dataset

from .test_trajectories import CHATML


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
    first, second = recipes("sft_then_rl", recipe=RECIPE | {"max_steps": 1e3})  # as YAML reads it
    assert (first["max_steps"], second["max_steps"]) == (500, 500)
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
        ({"max_steps": 0}, "max_steps: 0 must be a whole number of 1 or more"),
        ({"per_device_train_batch_size": 2}, "less than a group of 8"),
        ({"num_generations": 0}, "num_generations: 0 must be a whole number of 1 or more"),
        ({"num_generations": None}, "num_generations: None must be a whole number"),
        ({"gradient_accumulation_steps": "many"}, "gradient_accumulation_steps: 'many' must be a whole number"),
        ({"per_device_train_batch_size": 16.5}, "per_device_train_batch_size: 16.5 must be a whole number"),
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
        ("a: {stages: [{train: {}, share: 0.8}, {sft: {}, share: 0.2}, {train: {}}]}", "add up to 1, expected 1"),
        ("a: {stages: [{train: {}}]}\na: {stages: [{sft: {}}]}", "a is there twice, in lines 1 and 2"),
        ("a: {stages: [{train: {beta: 0.1, beta: 0.2}}]}", "beta is there twice"),
        ("a: {stages: [{train: []}]}", "must hold fields"),
        ("a: {stages: [{train: no}]}", "must hold fields"),
        ("a: {stages: [{train: {env: {A: b}}}]}", "stage 1: env is no field of a stage"),
        ("a: {stages: [{train: {}}, {sft: {seed: 3}}]}", "stage 2: seed is no field of a stage"),
        ("a: {stages: [{train: {model_name_or_path: b}}]}", "stage 1: model_name_or_path is no field of a stage"),
        ("a: {label: [x], stages: [{train: {}}]}", "label must be a text"),
        ("a: {stages: " + "[" * 5000 + "]" * 5000 + "}", "is no YAML: maximum recursion depth"),
        ("a: {stages: [{train: {x: " + "[" * 300 + "]" * 300 + "}}]}", "line 1 is nested too deeply"),
        ("a: {stages: &a [*a]}", "line 1 is nested too deeply"),
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


# Steps, and what is on record of them


def made_commands(directory: Path, accelerate_config: Path | None = None, evaluate=(), **changes) -> Commands:
    tests = [ProblemSet("held_out", "mine.jsonl"), ProblemSet("other", "other.jsonl")]
    config = None if accelerate_config is None else str(accelerate_config)
    return Commands(plan(output_dir=directory, **changes), tests, ["sampled"], config, evaluate, 2)


def run_of(directory: Path, *stages: Stage) -> PlannedRun:
    return PlannedRun("mine" if stages else "base", stages, 0, None, directory / "runs" / "mine")


SFT, RL = Stage("sft", {}, 0.5), Stage("train", {}, 0.5)


def do(step: Step, code: str = "pass", *arguments: str) -> None:
    Processes().run(replace(step, command=[sys.executable, "-c", code, *arguments]))


def done(steps: list[Step]) -> list[bool]:
    return [step.took() is not None for step in steps]


@pytest.mark.parametrize("recipe", [RECIPE, RECIPE | {"max_steps": 7}])
def test_one_removal_is_enough_for_a_step_and_all_that_was_made_from_it(tmp_path, recipe):
    run = run_of(tmp_path, SFT, RL)
    for step in made_commands(tmp_path).steps(run):
        do(step)
    first, second, *answers = steps = made_commands(tmp_path, recipe=recipe).steps(run)
    assert len(answers) == 2
    if recipe == RECIPE:
        assert done(steps) == [True] * 4
    else:
        with pytest.raises(
            ComparisonError, match=f"^{first.directory} was made with other settings .max_steps.*remove"
        ):
            first.took()
    (second.directory / "model" / "checkpoint-2").mkdir(parents=True)

    shutil.rmtree(first.directory)
    assert done(steps) == [False] * 4
    do(first)
    assert done(steps) == [True, False, False, False]
    do(second, f"assert not __import__('os').path.exists({str(second.directory / 'model')!r})")
    assert done(steps) == [True, True, False, False]
    do(answers[1])
    assert done(steps) == [True, True, False, True]


def test_a_step_that_got_as_far_as_a_checkpoint_is_of_its_settings_and_another_begins_anew(tmp_path):
    run = run_of(tmp_path, RL)
    [first, *_] = made_commands(tmp_path).steps(run)
    with pytest.raises(StageError):
        do(first, "exit(1)")
    [other, *_] = made_commands(tmp_path, recipe=RECIPE | {"learning_rate": 1e-4}).steps(run)
    assert other.took() is None  # nothing to lose
    with pytest.raises(StageError):
        do(other, f"__import__('os').makedirs({str(other.directory / 'model' / 'checkpoint-1')!r}); exit(1)")
    assert other.took() is None
    with pytest.raises(ComparisonError, match=r"other settings \(learning_rate\)"):
        first.took()


@pytest.mark.parametrize("text", ['{"seconds": 1.0, "cpu_seconds": 1.0, "settings": {}}', "{", "[1]"])
def test_a_record_of_an_earlier_version_or_a_damaged_one_is_a_sentence(tmp_path, text):
    [first, *_] = made_commands(tmp_path).steps(run_of(tmp_path, RL))
    first.directory.mkdir(parents=True)
    (first.directory / "done.json").write_text(text)
    with pytest.raises(ComparisonError, match=f"{first.directory}.*damaged.*remove"):
        first.took()


def test_settings_are_equal_once_they_are_written(tmp_path):
    odd = {"run_name": datetime.date(2024, 1, 1), "model_init_kwargs": {1: math.nan}}
    [first, *_] = made_commands(tmp_path, recipe=RECIPE | odd).steps(run_of(tmp_path, RL))
    do(first)
    assert first.took() is not None
    assert yaml.safe_load((first.directory / "recipe.yaml").read_text())["run_name"] == odd["run_name"]


@pytest.mark.parametrize(
    ("name", "of_stages", "of_answers"),
    [
        ("mine.jsonl", ["contents of dataset_name"], ["contents of dataset_name"]),
        ("launch.yaml", ["accelerate_config"], []),
        ("base/config.json", ["contents of model_name_or_path"], ["contents of model_name_or_path"]),
        ("ds.json", ["contents of deepspeed"], []),
        ("zero.json", ["contents of deepspeed_config_file"], []),
    ],
)
def test_another_file_of_the_same_name_is_another_setting(tmp_path, monkeypatch, name, of_stages, of_answers):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    launch = "{num_processes: 1, deepspeed_config: {deepspeed_config_file: zero.json}}"
    for path in ("mine.jsonl", "launch.yaml", "base/config.json", "ds.json", "zero.json"):
        (tmp_path / path).write_text(launch)
    recipe = RECIPE | {"dataset_name": "mine.jsonl", "deepspeed": "ds.json"}

    def steps() -> list[Step]:
        of_all = made_commands(tmp_path, Path("launch.yaml"), recipe=recipe, base="base")
        first, answers, _ = of_all.steps(run_of(tmp_path, RL))
        return [first, replace(answers, after=None)]

    for step in steps():
        do(step)
    assert done(steps()) == [True, True]
    (tmp_path / name).write_text(launch.replace("1", "2"))
    for step, names in zip(steps(), (of_stages, of_answers), strict=True):
        if names:
            with pytest.raises(ComparisonError, match=rf"other settings \({', '.join(names)}\)"):
                step.took()
        else:
            assert step.took() is not None


@pytest.mark.parametrize("text", ["", "[1]", "{"])
def test_an_accelerate_config_that_is_none_is_named(tmp_path, text):
    (tmp_path / "launch.yaml").write_text(text)
    with pytest.raises(ComparisonError, match=r"--accelerate_config .*launch\.yaml must be YAML"):
        made_commands(tmp_path, tmp_path / "launch.yaml").steps(run_of(tmp_path, RL))


def test_a_base_of_another_name_is_not_the_one_that_was_evaluated(tmp_path):
    base = run_of(tmp_path)
    do(made_commands(tmp_path).steps(base)[0])
    with pytest.raises(ComparisonError, match=r"other settings \(base\)"):
        made_commands(tmp_path, base="larger").steps(base)[0].took()


def test_reading_a_saved_dataset_makes_it_no_other(tmp_path):
    DatasetDict({"train": Dataset.from_dict({"a": [1, 2]})}).save_to_disk(str(tmp_path / "data"))
    before = data_fingerprint(str(tmp_path / "data"))
    load_from_disk(str(tmp_path / "data"))["train"].map(lambda row: {"b": row["a"]}, load_from_cache_file=False)
    assert list((tmp_path / "data").rglob("cache-*.arrow"))
    assert data_fingerprint(str(tmp_path / "data")) == before is not None
    DatasetDict({"train": Dataset.from_dict({"a": [1, 3]})}).save_to_disk(str(tmp_path / "other"))
    assert data_fingerprint(str(tmp_path / "other")) != before
    assert data_fingerprint("trl-lib/some-dataset") is None


@pytest.mark.parametrize(
    ("recipe", "stages", "starts", "evaluated"),
    [
        (True, ({},), ["base"], ("base", "stage-1")),
        (True, ({}, {}), ["base", "merged"], ("merged", "stage-2")),
        (True, ({"use_peft": False}, {}), ["base", "model"], ("model", "stage-2")),
        (True, ({}, {"use_peft": False}), ["base", "merged"], ("stage-2", None)),
        (False, ({}, {"use_peft": True}), ["base", "model"], ("model", "stage-2")),
        (False, ({"use_peft": True}, {}), ["base", "merged"], ("stage-2", None)),
        (False, ({},), ["base"], ("stage-1", None)),
    ],
)
def test_each_stage_says_itself_whether_it_leaves_an_adapter(tmp_path, recipe, stages, starts, evaluated):
    run = run_of(tmp_path, *(Stage("train", fields, 1 / len(stages)) for fields in stages))
    steps = made_commands(tmp_path, recipe=RECIPE | {"use_peft": recipe}).steps(run)
    trained = [step for step in steps if step.recipe is not None]
    assert [Path(step.recipe["model_name_or_path"]).name for step in trained] == starts
    assert len([step for step in steps if "--merge" in step.command]) == starts.count("merged")
    args = asked(steps[-1])
    names = {str(run.model("")): f"stage-{len(stages)}", None: None}
    assert (names.get(args.model, Path(args.model).name), names[args.adapter]) == evaluated


def test_merging_that_was_killed_begins_anew(tmp_path):
    run = run_of(tmp_path, SFT, RL)
    [first, merging, *_] = made_commands(tmp_path, recipe=RECIPE | {"use_peft": True}).steps(run)
    do(first)
    merged = Path(merging.command[-1])
    with pytest.raises(StageError):
        do(merging, f"__import__('os').mkdir({str(merged)!r}); exit(1)")
    do(merging, f"__import__('os').mkdir({str(merged)!r})")
    assert merging.took() is not None
    assert merged.is_dir()


def test_a_usage_error_is_said_though_a_launcher_hides_it(tmp_path):
    said = "luffy-trl train: error: --dataset_name x: there is no such file."
    hides = f"print({said!r}); print('ChildFailedError'); print('error_file: <N/A>'); exit(1)"
    [first, *_] = made_commands(tmp_path).steps(run_of(tmp_path, RL))
    with pytest.raises(StageError, match=f"ended with status 2: {re.escape(said)} .all of it") as error:
        do(first, hides, LAUNCHER)
    assert error.value.status == 2
    with pytest.raises(StageError, match="ended with status 1: out of memory") as error:  # an attempt of its own
        do(first, "print('out of memory'); exit(1)", LAUNCHER)
    assert error.value.status == 1


@pytest.mark.slow
def test_a_usage_error_of_a_launched_training_is_one(tmp_path):
    data = tmp_path / "none.jsonl"
    recipe = RECIPE | {"dataset_name": str(data), "use_cpu": True, "bf16": False}
    config = ROOT / "accelerate_configs" / "cpu.yaml"
    [first, *_] = made_commands(tmp_path, config, recipe=recipe).steps(run_of(tmp_path, RL))
    with pytest.raises(StageError, match=f"status 2: luffy-trl train: error: --dataset_name {data}: there is no such"):
        Processes().run(first)


# What an evaluation is told


def asked(step: Step):
    assert step.command[1:4] == ["-m", "luffy_trl", "eval"]
    return eval_parser("eval").parse_args(step.command[4:])


def test_an_evaluation_loads_and_asks_as_the_training_does(tmp_path):
    recipe = RECIPE | {
        "dataset_name": "mine.jsonl", "dataset_config": "hard", "model_revision": "1.0", "reward_weights": [1, 0.5],
        "reward_funcs": ["math_reward", "format_reward"], "trust_remote_code": "true",
        "chat_template_kwargs": {"enable_thinking": True},
    }  # fmt: skip
    evaluate = ["--backend", "vllm", "--model_args", "gpu_memory_utilization=0.5"]
    commands = made_commands(tmp_path, recipe=recipe, evaluate=evaluate)
    held_out, other = map(asked, commands.steps(run_of(tmp_path)))
    assert (held_out.dataset_config, other.dataset_config) == ("hard", None)
    assert held_out.reward_weights == [1, 0.5]
    assert held_out.backend == "vllm"
    thinking = {"enable_thinking": True, "trust_remote_code": True, "gpu_memory_utilization": 0.5}
    assert parse_model_args(held_out) == thinking | {"revision": "1.0"}
    trained = asked(commands.steps(run_of(tmp_path, RL))[-1])  # a directory has no revision
    assert parse_model_args(trained) == thinking
    adapter = asked(replace(commands, plan=plan(recipe=recipe | {"use_peft": True})).steps(run_of(tmp_path, RL))[-1])
    assert parse_model_args(adapter) == thinking | {"revision": "1.0"}
    own = Stage("train", {"chat_template_kwargs": {"enable_thinking": False}}, 1.0)
    assert parse_model_args(asked(commands.steps(run_of(tmp_path, own))[-1]))["enable_thinking"] is False
    assert asked(made_commands(tmp_path).steps(run_of(tmp_path))[0]).model_args == ""


def test_fields_and_labels_of_methods_are_taken_as_they_were_written(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "a: {label: 0.10, stages: [{train: {save_strategy: no, beta: 1e-6, skip_zero_advantages: false}}]}\n"
        "b: {label: , stages: [{train: , share: 0.7}, {sft: {}, share: 0.2}, {train: {}, share: 0.1}]}\n"
    )
    methods = known_methods(tmp_path / "mine.yaml")
    fields = {"save_strategy": "no", "beta": 1e-6, "skip_zero_advantages": False}
    assert methods["a"].stages == (Stage("train", fields, 1.0),)
    assert (methods["a"].label, methods["b"].label) == ("0.10", "b")
    assert stage_steps(methods["b"].stages, 1000) == [700, 200, 100]


def test_methods_with_one_label_are_not_compared(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "a: {label: GRPO, stages: [{train: {}}]}\nb: {label: base, stages: [{sft: {}}]}"
    )
    methods = known_methods(tmp_path / "mine.yaml")
    assert [method.name for method in chosen(["a", "luffy"], methods)] == ["a", "luffy"]
    with pytest.raises(ComparisonError, match="--methods grpo and a have one label, 'GRPO'"):
        chosen(["a", "grpo"], methods)
    with pytest.raises(ComparisonError, match="--methods b and base have one label"):
        chosen(["b"], methods)


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


def test_a_run_ends_with_its_token_budget(make_trainer, walks):
    trainer = make_trainer(max_steps=20, token_budget=500)
    trainer.train()
    seen = [log["num_tokens"] for log in trainer.state.log_history if "num_tokens" in log]
    assert seen[-2] < 500 <= seen[-1]
    assert trainer.state.global_step == len(seen) < 20


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
        (
            ["--methods", "luffy", "--chat_template_kwargs", "{thinking_budget: 9}"],
            "chat_template_kwargs: luffy-trl eval cannot be told of thinking_budget",
        ),
        (
            ["--methods", "luffy", "--model_init_kwargs", "{revision: abc}"],
            "model_init_kwargs: luffy-trl eval cannot be told of revision",
        ),
        (["--methods", "luffy", "stray"], "there is no such method"),
        (["--methods", "luffy", "--seeds", "0", "3", "0"], "--seeds 0 is there twice"),
        (["--methods", "luffy", "--seeds", "-1"], "--seeds -1 must be from 0 to 4294967295"),
        (["--methods", "luffy", "--seeds", "4294967296"], "--seeds 4294967296 must be from 0 to 4294967295"),
        (
            ["--methods", "luffy", "--learning_rates", "1e-3", "--rate_seeds", "7", "7"],
            "--rate_seeds 7 is there twice",
        ),
        (["--methods", "luffy", "--learning_rates", "1e-3", "--rate_seeds", "-7"], "--rate_seeds -7 must be from 0"),
        (
            ["--methods", "luffy", "--learning_rates", "1e-3", "0.001", "--rate_seeds", "7"],
            "--learning_rates 0.001 is there twice",
        ),
        *(
            (
                ["--methods", "luffy", "--learning_rates", rate, "--rate_seeds", "7"],
                f"--learning_rates {rate} must be a number above 0",
            )
            for rate in ("nan", "inf", "0", "-1")
        ),
        (["--methods", "luffy", "--answers", "greedy", "greedy"], "--answers greedy is there twice"),
        (["--methods", "luffy", "--test_sets", "a=x.jsonl", "a=y.jsonl"], "--test_sets a is there twice"),
        (["--methods", "luffy", "--push_to_hub"], "push_to_hub: True: all runs would push to one place"),
        (["--methods", "luffy", "--hub_model_id", "me/it"], "hub_model_id: me/it: all runs would push to one place"),
        (["--methods", "luffy", "--eval_args", "--push_to_hub me/it"], "--eval_args --push_to_hub: all runs"),
        (["--methods", "luffy", "--eval_args", "--hub_token hf_secret"], "--eval_args: arguments are written down"),
        (
            ["--methods", "luffy", "--model_init_kwargs", "{token: hf_secret}"],
            "model_init_kwargs: recipes are written down",
        ),
        (["--methods", "luffy", "--generation_kwargs", "{a: 1, a: 2}"], "--generation_kwargs: a is there twice"),
        (["--methods", "luffy", "--generation_kwargs", "[" * 300 + "]" * 300], "line 1 is nested too deeply"),
        (["--methods", "luffy", "--env", "A"], "--env is no flag"),
        (["--methods", "sft", "--report_to", "nowhere"], "sft, stage 1: --report_to nowhere is not one of none"),
    ],
)
def test_what_cannot_be_compared_is_one_sentence_before_anything_runs(files, tmp_path, capsys, more, message):
    with pytest.raises(SystemExit) as stop:
        main(command(files, tmp_path / "out", *more))
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out" / "runs").exists()


def prepared(files, tmp_path, text="", methods=("luffy",), **changes) -> Comparison:
    """With a recipe of other fields and, beside ours, methods of one's own."""
    recipe = yaml.safe_load((files / "recipe.yaml").read_text()) | changes
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({k: v for k, v in recipe.items() if v is not None}))
    argv = ["--config", str(tmp_path / "recipe.yaml"), "--output_dir", str(tmp_path / "out"), "--methods", *methods]
    if text:
        (tmp_path / "mine.yaml").write_text(text)
        argv += ["--methods_file", str(tmp_path / "mine.yaml")]
    args, overrides = build_parser("compare").parse_known_args(argv)
    return Comparison(args, overrides)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset_name": None}, "dataset_name must be in the recipe, or a flag: what is .* to be trained on"),
        ({"model_name_or_path": None}, "model_name_or_path must be in the recipe"),
        ({"token_budget": 0}, "token_budget: 0 must be a whole number of 1 or more"),
        ({"token_budget": "many"}, "token_budget: many must be a whole number"),
        ({"dataset_test_split": "train"}, "has one split, 'train', as dataset_train_split and dataset_test_split: .*"),
        ({"dataset_test_split": "late"}, "has no split 'late', only .*: methods would be evaluated on what they were"),
        ({"dataset_name": "reasoning_gym:chain_sum,size=8,test_size=0"}, r"no split 'test'.*\(test_size=100 in its"),
        ({"log_completions_hub_repo": "me/it"}, "log_completions_hub_repo: me/it: all runs would push"),
        ({"env": ["A"]}, "env must hold names of environment variables"),
    ],
)
def test_a_recipe_that_cannot_be_compared_is_refused(files, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        prepared(files, tmp_path, **changes)
    assert not (tmp_path / "out" / "runs").exists()


def test_a_file_without_a_test_split_is_not_held_out(files, tmp_path, chat_model_dir):
    """The message's command makes a dataset that is taken."""
    rows = [{"prompt": f"What is {n} + {n}?", "completion": f"It is \\boxed{{{2 * n}}}.", "solution": str(2 * n)}
            for n in range(32)]  # fmt: skip
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"reward_funcs": "math_reward_optional_thought", "model_name_or_path": str(chat_model_dir)}
    with pytest.raises(ComparisonError, match="has no split 'test', only 'train'") as refusal:
        prepared(files, tmp_path, dataset_name=str(tmp_path / "sums.jsonl"), **changes)
    [make] = re.findall(r"\(luffy-trl (prepare-data .*?)\)", str(refusal.value))
    main(make.replace("DIR", str(tmp_path / "made")).replace("--test_size 100", "--test_size 4").split())
    comparison = prepared(files, tmp_path, dataset_name=str(tmp_path / "made"), **changes)
    assert comparison.commands.tests[0].dataset == str(tmp_path / "made")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: {stages: [{train: {hub_token: hf_secret}}]}", "a, stage 1: hub_token: recipes are written down"),
        ("a: {stages: [{train: {push_to_hub: yes}}]}", "a, stage 1: push_to_hub: yes: all runs would push"),
        ("a: {stages: [{train: {}}, {sft: {hub_model_id: me/it}}]}", "a, stage 2: hub_model_id: me/it: all runs"),
        ("a: {stages: [{sft: {reward_funcs: format_reward}}]}", "a, stage 1: --reward_funcs: SFT looks at no reward"),
        (
            "a: {stages: [{train: {dataset_train_split: test}}]}",
            "stage 1: dataset_train_split test is what is held out",
        ),
        ("a: {stages: [{train: {dataset_name: no.jsonl}}]}", "a, stage 1: --dataset_name no.jsonl: there is no such"),
    ],
)
def test_what_a_stage_must_not_have_is_refused(files, tmp_path, text, message):
    with pytest.raises(ComparisonError, match=message):
        prepared(files, tmp_path, text, methods=("luffy", "a"))


EVALUATED = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (EVALUATED | {"metric_for_best_model": "eval_reward"}, "sft, stage 1: metric_for_best_model='eval_reward' is"),
        ({"dataset_streaming": True}, "sft, stage 1: --dataset_streaming is for train.py"),
        ({"columns": ["completion"]}, "sft, stage 1: .* needs one of the columns `completion` and `demonstrations`"),
        ({"columns": ["solution"]}, "grpo, stage 1: --reward_funcs math_reward needs the column 'solution'"),
        ({"trajectories": True}, "sft, stage 1: Row 0: `completion` is a trajectory: set --assistant_only_loss true"),
    ],
)
def test_what_a_later_stage_would_refuse_is_refused_before_the_first(
    files, tmp_path, chat_model_dir, changes, message
):
    """SFT and GRPO, in either order."""
    changes = dict(changes) | {"reward_funcs": "math_reward", "model_name_or_path": str(chat_model_dir)}
    trajectory = [{"role": "assistant", "content": "a"}, {"role": "user", "content": "?"}]
    trajectory.append({"role": "assistant", "content": "b"})
    prompt = [{"role": "user", "content": "1 + 1?"}]
    if not (is_trajectory := changes.pop("trajectories", False)):
        prompt, trajectory = "1 + 1?", "2"
    row = {"prompt": prompt, "completion": trajectory, "solution": "2"}
    for column in changes.pop("columns", []):
        del row[column]
    (tmp_path / "rows").mkdir()
    for split in ("train", "test"):
        (tmp_path / "rows" / f"{split}.jsonl").write_text(f"{json.dumps(row)}\n" * 8)
    if is_trajectory:
        chat = AutoTokenizer.from_pretrained(chat_model_dir)
        chat.chat_template = CHATML
        shutil.copytree(chat_model_dir, tmp_path / "model")
        chat.save_pretrained(tmp_path / "model")
        changes["model_name_or_path"] = str(tmp_path / "model")
    changes["dataset_name"] = str(tmp_path / "rows")
    for methods in (("grpo", "sft"), ("sft", "grpo")):
        with pytest.raises(ComparisonError, match=message):
            prepared(files, tmp_path, methods=methods, **changes)
    if is_trajectory:  # docs/compare.md says what to do
        mine = "mine: {stages: [{sft: {assistant_only_loss: true}}]}"
        comparison = prepared(files, tmp_path, mine, methods=("grpo", "mine"), **changes)
        recipe = comparison.plan.stage_recipe(comparison.plan.runs(comparison.methods, [0], {})[-1], 0)
        (tmp_path / "sft.yaml").write_text(yaml.safe_dump(recipe | {"max_steps": 1}))
        main(["sft", "--config", str(tmp_path / "sft.yaml")])
        assert (Path(recipe["output_dir"]) / "model.safetensors").is_file()


def test_a_token_budget_of_the_recipe_is_shared_as_the_flag_is(files, tmp_path):
    comparison = prepared(files, tmp_path, methods=("sft_then_rl",), token_budget=1000)
    [_, run] = comparison.plan.runs(comparison.methods, [0], {})
    assert [comparison.plan.stage_recipe(run, number)["token_budget"] for number in (0, 1)] == [500, 500]


def test_variables_of_the_recipe_are_set_and_never_written(files, tmp_path, monkeypatch):
    """They may be secrets."""
    for name in ("WANDB_API_KEY", "AS_WRITTEN"):
        monkeypatch.setenv(name, "before")
    comparison = prepared(files, tmp_path, env={"WANDB_API_KEY": "0123456789abcdef", "AS_WRITTEN": "no"})
    assert (os.environ["WANDB_API_KEY"], os.environ["AS_WRITTEN"]) == ("0123456789abcdef", "no")
    settings = [step.settings for run in comparison.plan.runs(comparison.methods, [0], {}) for step in
                comparison.commands.steps(run)]  # fmt: skip
    assert "0123456789abcdef" not in json.dumps([settings, comparison._facts()])


def test_the_embedded_task_has_one_test_split_for_all_seeds(files, tmp_path):
    """With a model too: `letter_walk` by its name would be other walks for each seed, tests among them."""
    comparison = prepared(files, tmp_path, dataset_name="letter_walk")
    [held_out] = comparison.commands.tests
    assert held_out.dataset == comparison.plan.recipe["dataset_name"] == str(tmp_path / "out" / "data")
    assert comparison.plan.base == yaml.safe_load((files / "recipe.yaml").read_text())["model_name_or_path"]
