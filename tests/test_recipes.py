"""Every recipe: the real parser reads it; and the commands in its first lines run, two steps each, on a tiny model."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pandas as pd
import pytest
import trl
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, set_seed
from trl import ModelConfig, TrlParser

from luffy_trl import LuffyConfig
from luffy_trl.commands.cli import main
from luffy_trl.commands.compare import Comparison, build_parser
from luffy_trl.commands.inputs import LuffyScriptArguments, check_arguments, check_dataset_arguments
from luffy_trl.commands.sft import LuffySFTConfig
from luffy_trl.comparing.methods import known_methods
from luffy_trl.comparing.plan import Plan, field_names


ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
FIELDS = {path: yaml.safe_load(path.read_text()) for path in RECIPES}
SFT_RECIPES = [path for path in RECIPES if "num_generations" not in FIELDS[path]]
SIZES = ("qwen2.5_math_7b", "qwen2.5_math_1.5b", "qwen2.5_7b_instruct", "llama3.1_8b")
CPU = ["--use_cpu", "--bf16", "False"]


def parsed(recipe: Path):
    config = LuffySFTConfig if recipe in SFT_RECIPES else LuffyConfig
    return TrlParser((LuffyScriptArguments, config, ModelConfig)).parse_args_and_config(
        ["--config", str(recipe), *CPU]
    )


# As they are written


def test_there_are_recipes():
    assert len(RECIPES) >= 24
    assert len(SFT_RECIPES) >= 5
    names = {path.stem for path in RECIPES}
    assert {f"{kind}_{size}" for kind in ("luffy", "sft", "sft_then_rl") for size in SIZES} <= names


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_parse(recipe):
    script_args, training_args, model_args = parsed(recipe)
    (check_dataset_arguments if recipe in SFT_RECIPES else check_arguments)(script_args, model_args)
    written = FIELDS[recipe]
    assert training_args.learning_rate == written["learning_rate"]
    assert training_args.output_dir == written["output_dir"] == f"outputs/{recipe.stem}"
    if recipe in SFT_RECIPES:
        assert training_args.max_length is None
    else:
        assert training_args.num_demonstrations == written["num_demonstrations"]


@pytest.mark.parametrize("size", SIZES)
def test_baselines_have_their_published_values_and_start_where_luffy_does(size):
    """arXiv 2604.23747, appendix A: the same for each model, on 8 GPUs."""
    luffy, sft, rl = (FIELDS[ROOT / "recipes" / f"{kind}_{size}.yaml"] for kind in ("luffy", "sft", "sft_then_rl"))
    assert sft["model_name_or_path"] == luffy["model_name_or_path"]
    assert rl["model_name_or_path"] == sft["output_dir"]
    assert sft["dataset_name"] == rl["dataset_name"] == luffy["dataset_name"]
    assert 8 * sft["per_device_train_batch_size"] * sft["gradient_accumulation_steps"] == 64
    assert (sft["num_train_epochs"], sft["learning_rate"], sft["warmup_steps"]) == (3, 5e-5, 0.1)
    assert sft["lr_scheduler_kwargs"] == {"min_lr_rate": 0.1}
    rows = 8 * rl["per_device_train_batch_size"] * rl["gradient_accumulation_steps"]
    assert (rows, rl["steps_per_generation"]) == (64 * 8, 2 * rl["gradient_accumulation_steps"])
    assert (rl["max_steps"], rl["learning_rate"], rl["num_demonstrations"]) == (1000, 1e-6, 0)
    assert (rl["epsilon"], rl["epsilon_high"], rl["entropy_coef"]) == (0.2, 0.28, 0)
    same = ("max_completion_length", "temperature", "loss_type", "scale_rewards", "beta", "reward_funcs")
    assert all(rl[name] == luffy[name] for name in same)


def test_the_rate_falls_to_a_tenth_after_warming_up(tiny_model_dir, tmp_path):
    argv = ["sft", "--config", str(ROOT / "recipes" / "sft_qwen2.5_math_7b.yaml"), *CPU, *ON_A_CPU["sft"]]
    main([*argv, "--model_name_or_path", str(tiny_model_dir), "--dataset_name", "letter_walk", "--max_steps", "20",
          "--output_dir", str(tmp_path)])  # fmt: skip
    log = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    rates = [line["learning_rate"] for line in log if "learning_rate" in line]
    assert rates[:3] == [0, 2.5e-5, 5e-5]  # of 20 steps 2 warm up
    assert rates[-1] == pytest.approx(5e-6, rel=0.1)


# As they are run

FEW = ["--attn_implementation", "eager", "--report_to", "none", "--save_strategy", "no", "--logging_steps", "1"]
FEW += ["--gradient_accumulation_steps", "1"]
FEW_ROLLOUTS = ["--use_vllm", "False", "--per_device_train_batch_size", "8", "--steps_per_generation", "1"]
FEW_ROLLOUTS += ["--max_completion_length", "512", "--generation_kwargs", '{"max_new_tokens": 16}']
ON_A_CPU = {
    "sft": FEW,
    "train": [*FEW, *FEW_ROLLOUTS, "--dtype", "float32", "--eval_strategy", "no", "--num_completions_to_print", "0"],
}
SMALL_DATA = {"size=2000,test_size=200": "size=8,test_size=1", "size=600,test_size=64": "size=8,test_size=1"}
TEMPLATES = Path(trl.__path__[0]) / "chat_templates"
TURN = "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
SMOLLM2 = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nBe SmolLM.<|im_end|>\n"
    "{% endif %}" + TURN + "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Of the Hub: the architecture, and the chat template if it has one
BASES = {
    "Qwen/Qwen2.5-Math-7B": ("qwen2", None),
    "Qwen/Qwen2.5-Math-1.5B": ("qwen2", None),
    "Qwen/Qwen2.5-7B-Instruct": ("qwen2", (TEMPLATES / "qwen2_5.jinja").read_text()),
    "Qwen/Qwen2.5-0.5B-Instruct": ("qwen2", (TEMPLATES / "qwen2_5.jinja").read_text()),
    "Qwen/Qwen3-1.7B": ("qwen3", (TEMPLATES / "qwen3.jinja").read_text()),
    "meta-llama/Llama-3.1-8B": ("llama", None),
    "HuggingFaceTB/SmolLM2-135M-Instruct": ("llama", SMOLLM2),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory, chat_tokenizer) -> dict[str, Path]:
    """What the recipes train, tiny and with random weights."""
    return {name: tiny(tmp_path_factory.mktemp("base"), chat_tokenizer, *kind) for name, kind in BASES.items()}


def tiny(directory: Path, tokenizer: PreTrainedTokenizerBase, architecture: str, template: str | None) -> Path:
    tokenizer.save_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.chat_template = template
    if template is not None:
        tokenizer.eos_token = "<|im_end|>"
    if architecture == "qwen3":
        tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.save_pretrained(directory)
    set_seed(0)
    config = AutoConfig.for_model(
        architecture, vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=4096, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def openr1(tmp_path_factory) -> Path:
    """With the columns of Elliott/Openr1-Math-46k-8192."""
    rows = [
        {
            "prompt": [{"role": "system", "content": "Think."}, {"role": "user", "content": f"What is {n} + 1?"}],
            "target": [{"role": "assistant", "content": f"<think>\n{n}+1\n</think>\n\n\\boxed{{{n + 1}}}"}],
            "reward_model": {"ground_truth": str(n + 1), "style": "rule"},
            "data_source": "math", "ability": "math", "extra_info": {"index": n, "split": "default"},
        }
        for n in range(8)
    ]  # fmt: skip
    path = tmp_path_factory.mktemp("openr1") / "openr1.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def commands(recipe: Path) -> list[list[str]]:
    """Those of the recipe's first lines that are ours, as arguments of `luffy-trl`."""
    lines = re.findall(r"^#   (.+)$", recipe.read_text(), flags=re.MULTILINE)
    found = []
    for command in "\n".join(lines).replace("\\\n", " ").splitlines():
        if "train.py" in command:
            found.append(["train", *shlex.split(command.split("train.py")[1])])
        elif re.search(r"\bluffy[-_]trl (prepare-model|sft)", command):
            found.append(shlex.split(re.split(r"luffy[-_]trl (?=prepare|sft)", command)[1]))
    return found


def on_a_cpu(argv: list[str], bases: dict[str, Path], data: Path) -> list[str]:
    argv = [str(bases.get(part, part)) for part in argv]
    if argv[0] == "prepare-model":
        return argv
    fields = {}
    if "--config" in argv:
        place = argv.index("--config") + 1
        recipe = ROOT / argv[place]
        fields, argv[place] = FIELDS[recipe], str(recipe)
    argv += [*CPU, *ON_A_CPU[argv[0]], "--max_steps", "2"]
    base = fields.get("model_name_or_path")
    if base in bases:
        argv += ["--model_name_or_path", str(bases[base])]
    name = fields.get("dataset_name", "")
    if name.startswith("Elliott/"):
        argv += ["--dataset_name", str(data)]
    for large, small in SMALL_DATA.items():
        if large in name:
            argv += ["--dataset_name", name.replace(large, small)]
    return argv


@pytest.mark.parametrize(
    "recipe",
    [path for path in RECIPES if path.stem.startswith(("luffy_", "sft_then_rl_", "grpo_"))],
    ids=lambda path: path.stem,
)
def test_the_commands_of_a_recipe_run(recipe, bases, openr1, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for argv in commands(recipe):
        main(on_a_cpu(argv, bases, openr1))

    output, fields = tmp_path / "outputs" / recipe.stem, FIELDS[recipe]
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    assert [line["step"] for line in log if "on_policy/reward" in line] == [1, 2]
    assert (output / ("adapter_model.safetensors" if fields.get("use_peft") else "model.safetensors")).is_file()
    if fields["num_demonstrations"] == 0:
        return
    assert all(line["off_policy/reward"] == 1 for line in log if "on_policy/reward" in line)
    assert not any(line["off_policy/dropped"] for line in log if "on_policy/reward" in line)
    table = pd.concat(pd.read_parquet(path) for path in sorted((output / "completions").glob("*.parquet")))
    demonstrated = [row.completion[0]["content"] for row in table.itertuples() if row.demonstration]
    assert len(demonstrated) == 2
    # A template that begins the thought leaves its beginning out of the demonstration; Qwen3's leaves it to the model
    assert all(text.startswith("<think>") for text in demonstrated) is (
        "qwen3" in recipe.stem or "7b_instruct" in recipe.stem
    )


# One command from the data to the table


@pytest.mark.slow
def test_the_paper_and_its_baselines_are_one_command(bases, openr1, tmp_path):
    """The command of docs/compare.md: each stage of each method, trained in this process."""
    page = (ROOT / "docs" / "compare.md").read_text()
    [block] = re.findall(r"```bash\n(luffy-trl prepare-data .*?)```", page, flags=re.DOTALL)
    [command] = [line for line in block.replace("\\\n", " ").splitlines() if " compare " in line]
    argv = [str(ROOT / part) if (ROOT / part).is_file() else part for part in shlex.split(command)[2:]]
    small = (
        "--attn_implementation eager --use_vllm False --per_device_train_batch_size 8 --gradient_accumulation_steps 1 "
    )
    small += "--steps_per_generation 1 --max_completion_length 128 --max_steps 2 --save_strategy no --report_to none"
    argv += [*small.split(), *CPU, "--generation_kwargs", '{"max_new_tokens": 16}', "--output_dir", str(tmp_path)]
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        shutil.copy(openr1, tmp_path / "data" / f"{split}.jsonl")
    argv += ["--model_name_or_path", str(bases["Qwen/Qwen2.5-7B-Instruct"]), "--dataset_name", str(tmp_path / "data")]
    args, overrides = build_parser("compare").parse_known_args(argv)
    comparison = Comparison(args, overrides)
    assert [method.name for method in comparison.methods] == args.methods
    assert {"grpo", "luffy", "sft", "sft_then_rl"} <= set(args.methods)

    for run in comparison.plan.runs(comparison.methods, [0], {}):
        recipes = [comparison.plan.stage_recipe(run, number) for number in range(len(run.stages))]
        check_lengths(run.name, recipes)
        for stage, recipe in zip(run.stages, recipes, strict=True):
            if run.name.startswith("sft_then") and stage.command == "train":
                recipe["max_steps"] = 2
            path = tmp_path / "recipe.yaml"
            path.write_text(yaml.safe_dump(recipe))
            main([stage.command, "--config", str(path)])
            assert (Path(recipe["output_dir"]) / "model.safetensors").is_file()


def test_methods_of_the_paper_have_their_published_lengths(tmp_path):
    """As the recipes of one method each. 2 steps are a generation: 500 are 1000 steps, 50 are 100."""
    luffy, rl = (FIELDS[ROOT / "recipes" / f"{kind}_qwen2.5_math_7b.yaml"] for kind in ("luffy", "sft_then_rl"))
    methods = known_methods(ROOT / "recipes" / "methods" / "paper.yaml")
    assert {"grpo", "sft", "sft_then_rl", "sft_then_short_rl"} <= set(methods)
    plan = Plan(luffy, "base", tmp_path, None, field_names(LuffyScriptArguments, LuffySFTConfig, ModelConfig))
    for run in plan.runs([methods[name] for name in ("sft_then_rl", "sft_then_short_rl")], [0], {})[1:]:
        recipes = [plan.stage_recipe(run, number) for number in (0, 1)]
        check_lengths(run.name, recipes)
        assert all(recipes[1][name] == rl[name] for name in ("epsilon", "epsilon_high", "entropy_coef"))
    assert (luffy["max_steps"], rl["max_steps"]) == (1000, 1000)


def check_lengths(method: str, recipes: list[dict]) -> None:
    """SFT has its own rate and epochs, not the recipe's, with which it would be a weak baseline."""
    for recipe in recipes:
        if "num_generations" not in recipe:
            assert (recipe["num_train_epochs"], recipe["max_steps"], recipe["learning_rate"]) == (3, -1, 5e-5)
    if method == "luffy":
        assert (recipes[0]["max_steps"], recipes[0]["epsilon"]) == (2, 1e6)
    if method.startswith("sft_then"):
        assert recipes[1]["model_name_or_path"] == recipes[0]["output_dir"]
        assert recipes[1]["num_demonstrations"] == 0
    if method == "sft_then_rl":
        assert (recipes[1]["max_steps"], recipes[1]["learning_rate"]) == (1000, 1e-6)
    if method == "sft_then_short_rl":
        assert (recipes[1]["max_steps"], recipes[1]["learning_rate"]) == (100, 5e-6)
