"""Prompts with images beside demonstrations: tiny models of four families, loss and gradient against plain torch."""

import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from luffy_trl import LuffyTrainer

from .run_two_processes import letters_reward
from .test_trainer_loss import GROUP, REGULARIZED, logps_and_entropies, objective, perturb
from .tiny_vlm import (
    COLORS,
    build_gemma3,
    build_llava,
    build_llava_next,
    build_model,
    build_processor,
    one_image,
    question,
    several_images,
    square,
)


def build_qwen():
    processor = build_processor()
    return processor, build_model(processor)


@pytest.fixture(scope="session")
def vlms(tmp_path_factory):
    """Each model's processor, and the directory of its weights."""
    made = {}
    for build in (build_qwen, build_gemma3, build_llava, build_llava_next):
        processor, model = build()
        made[build] = processor, tmp_path_factory.mktemp(build.__name__)
        model.save_pretrained(made[build][1])
    return made


@pytest.fixture(scope="session")
def processor(vlms):
    return vlms[build_qwen][0]


def text_reward(completions, **kwargs) -> list[float]:
    return letters_reward([completion[0]["content"] for completion in completions])


@pytest.fixture
def make_vlm_trainer(config, vlms):
    def make(
        dataset: Dataset, reward=text_reward, trainer_options: dict | None = None, build=build_qwen, **overrides
    ) -> LuffyTrainer:
        processor, vlm_dir = vlms[build]
        options = {"max_completion_length": 12, "ddp_find_unused_parameters": False} | overrides
        return LuffyTrainer(
            str(vlm_dir),
            reward,
            config(**options),
            train_dataset=dataset,
            processing_class=processor,
            **(trainer_options or {}),
        )

    return make


def images_of(row) -> list:
    return row["images"] if "images" in row else [row["image"]]


def messages_of(row) -> list[dict]:
    """The prompt with its images in their places, written here."""
    content = row["prompt"][0]["content"]
    if isinstance(content, str):
        content = [{"type": "image"}, {"type": "text", "text": content}]
    return [{"role": "user", "content": content}]


def whole_batch(trainer, rows, ratio=1.0) -> list[dict]:
    """Each row of the generation by position, its images from the dataset by the prompt that the batch has."""
    processor, facts = trainer.processing_class, []
    for batch in trainer._buffered_inputs:
        for prompt, p_mask, completion, c_mask in zip(
            batch["prompt_ids"], batch["prompt_mask"], batch["completion_ids"], batch["completion_mask"], strict=True
        ):
            prompt_ids, ids = prompt[p_mask.bool()], completion[c_mask.bool()]
            text = processor.tokenizer.decode(prompt_ids)
            [row] = [row for i, row in enumerate(rows) if question(i) + "<|im_end|>" in text]
            rendered = processor.apply_chat_template(messages_of(row), add_generation_prompt=True)
            seen = processor(images=images_of(row), text=[rendered], return_tensors="pt")
            assert seen["input_ids"][0].tolist() == prompt_ids.tolist()
            of_images = {name: value for name, value in seen.items() if name not in ("input_ids", "attention_mask")}
            for kinds in ("token_type_ids", "mm_token_type_ids"):
                if kinds in seen:
                    of_images[kinds] = torch.cat([seen[kinds], seen[kinds].new_zeros(1, len(ids))], dim=1)
            demonstration = processor.tokenizer(row["completion"][0]["content"] + "<|im_end|>")["input_ids"]
            prefix = demonstration[: int(ratio * len(demonstration))]
            off_policy = ids[: len(prefix)].tolist() == prefix
            facts.append(
                {
                    "prompt": text, "prompt_ids": prompt_ids, "ids": ids, "off_policy": off_policy, "counts": True,
                    "given": len(prefix) if off_policy else 0,
                    "reward": letters_reward([processor.tokenizer.decode(ids, skip_special_tokens=True)])[0],
                    "images": of_images,
                }
            )  # fmt: skip
    for fact in facts:
        group = [other["reward"] for other in facts if other["prompt"] == fact["prompt"]]
        assert len(group) == GROUP
        fact["advantage"] = fact["reward"] - sum(group) / len(group)
    return facts


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (one_image, {}),
        (several_images, {}),
        (several_images, {"trim_padding": False}),
        (several_images, {"loss_type": "dapo", "beta": 0.1}),
        (several_images, {"prefix_max": 0.6}),
        (one_image, {"temperature": 0.7}),
        (one_image, {"loss_type": "dapo", "demonstration_average": "sequence"}),
        (one_image, {"build": build_gemma3, "pad_to_multiple_of": 7}),
        (several_images, {"build": build_gemma3, "loss_type": "dapo", "beta": 0.1}),
        (one_image, {"build": build_llava, "beta": 0.1, "loss_type": "dapo"}),
        (several_images, {"build": build_llava}),
        (one_image, {"build": build_llava_next}),
        (several_images, {"build": build_llava_next, "pad_to_multiple_of": 7}),
    ],
)
def test_loss_and_gradients_of_a_mixed_group_with_images_equal_plain_torch(make_vlm_trainer, make, options):
    rows = make()
    trainer = make_vlm_trainer(rows, steps_per_generation=2, gradient_accumulation_steps=1, **options)
    model, temperature = trainer.model, options.get("temperature", 1.0)
    model.train()
    trainer.current_gradient_accumulation_steps = 1
    inputs = trainer._prepare_inputs([row for row in trainer.train_dataset for _ in range(GROUP)])
    facts = whole_batch(trainer, rows, options.get("prefix_max", 1.0))
    with torch.no_grad():
        old_logps = [logps_and_entropies(model, fact, temperature)[0] for fact in facts]
    perturb(model)  # of the vision tower too

    trainer.compute_loss(model, inputs).backward()
    # Of LLaVA's vision tower the last layer is not used
    used = {name: p for name, p in model.named_parameters() if p.grad is not None}
    # Without rotary positions a bias of all keys is nothing to attention
    used = {name: p for name, p in used.items() if not ("vision_tower" in name and name.endswith("k_proj.bias"))}
    gradients = {name: p.grad.clone() for name, p in used.items()}
    loss = trainer.compute_loss(model, inputs).detach()
    model.zero_grad()
    expected = objective(
        model, trainer.ref_model, facts, old_logps, options.get("loss_type", "dr_grpo"), options.get("beta", 0.0),
        0.0, 2, REGULARIZED, 1.0, temperature, options.get("demonstration_average", "joint"),
        max_length=trainer.max_completion_length,
    )  # fmt: skip
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-7)
    for name, parameter in used.items():
        difference = (gradients[name] - parameter.grad).norm() / parameter.grad.norm()
        assert difference < 1e-5, f"{name}: relative difference {difference:.2e}"
    assert any("vis" in name and gradient.norm() > 0 for name, gradient in gradients.items())
    assert sum(fact["off_policy"] for fact in facts) == 4


def test_a_rows_images_go_where_the_row_goes(make_vlm_trainer, processor):
    """Ordered by length over the micro-batches of a step, and cut to the longest row of each."""
    rows = several_images()
    trainer = make_vlm_trainer(
        rows, per_device_train_batch_size=4, gradient_accumulation_steps=4, steps_per_generation=4
    )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 4
    trainer._prepare_inputs([row for row in trainer.train_dataset for _ in range(GROUP)])
    widths = []
    for batch in trainer._buffered_inputs:
        lengths = batch["completion_mask"].sum(1)
        assert batch["completion_ids"].size(1) == lengths.max()
        whole = batch["prompt_ids"].size(1) + batch["completion_ids"].size(1)
        assert batch["mm_token_type_ids"].shape == (4, whole)
        widths.append(whole)
        is_image = batch["prompt_ids"] == processor.image_token_id
        assert torch.equal(batch["mm_token_type_ids"][:, : is_image.size(1)].bool(), is_image)
        patches = batch["pixel_values"].split([int(grid.prod()) for grid in batch["image_grid_thw"]])
        owners = [i for i, number in enumerate(batch["num_images"]) for _ in range(number)]
        assert len(owners) == len(patches)
        for i, pixels in zip(owners, patches, strict=True):
            text = processor.tokenizer.decode(batch["prompt_ids"][i])
            color = list(COLORS)[text.count("?") - 1]
            expected = processor.image_processor(square(color), return_tensors="pt")["pixel_values"]
            torch.testing.assert_close(pixels, expected[:1].expand_as(pixels))
    assert len(set(widths)) > 1


@pytest.mark.parametrize("options", [{}, {"skip_zero_advantages": True}])
def test_a_step_without_padding_is_the_step_with_it(make_vlm_trainer, options):
    def trained(**more):
        # the first two groups have nothing to learn from, whatever is sampled
        def reward(prompts, completions, **kwargs):
            rewards = text_reward(completions)
            return [r if str(p).count("?") > 2 else 1.0 for p, r in zip(prompts, rewards, strict=True)]

        batches = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "optim": "sgd"}
        trainer = make_vlm_trainer(several_images(), reward=reward, max_steps=1, **batches, **more)
        trainer.train()
        return trainer.model.state_dict()

    padded, trimmed = trained(trim_padding=False), trained(**options)
    for name, tensor in padded.items():
        torch.testing.assert_close(trimmed[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"demonstration_source": "replay", "replay_start": 0.0},
        {"success_gate": 0.5},
        {"tokens_per_micro_batch": 200},
    ],
)
def test_it_trains_evaluates_and_logs_its_completions(make_vlm_trainer, options):
    def every_other(completions, **kwargs):
        return [float(i % 2) for i in range(len(completions))]

    rows = several_images(8)
    kept = rows.remove_columns("completion") if "demonstration_source" in options else rows
    trainer = make_vlm_trainer(
        kept,
        reward=every_other,
        max_steps=3,
        log_completions=True,
        num_completions_to_print=0,
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=4,
        trainer_options={"eval_dataset": rows.select(range(2))},
        **options,
    )
    trainer.train()
    logged = [line for line in trainer.state.log_history if "loss" in line]
    assert len(logged) == 3
    assert logged[-1]["groups/guided"] > 0
    assert any("eval_reward" in line for line in trainer.state.log_history)


def test_the_dataset_of_the_docs_trains(make_vlm_trainer, tmp_path, monkeypatch):
    page = (Path(__file__).parents[1] / "docs" / "data.md").read_text()
    [block] = re.findall(r"```python\n(from datasets import Dataset, Image\n.*?)```", page, flags=re.DOTALL)
    square("red", 2).save(tmp_path / "squares.png")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(block, names)
    dataset = names["dataset"]
    trainer = make_vlm_trainer(dataset, per_device_train_batch_size=4, max_completion_length=40, max_steps=1)
    trainer.train()
    [line] = [line for line in trainer.state.log_history if "loss" in line]
    assert line["groups/guided"] == 1.0


def test_the_path_of_a_file_is_an_image(make_vlm_trainer, tmp_path):
    rows = one_image()
    for i, image in enumerate(rows["image"]):
        image.save(tmp_path / f"{i}.png")
    paths = [str(tmp_path / f"{i}.png") for i in range(len(rows))]
    losses = []
    for dataset in (rows, rows.remove_columns("image").add_column("images", [[path] for path in paths])):
        trainer = make_vlm_trainer(dataset, max_steps=1)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[0] == losses[1] != 0


def test_rows_with_and_without_images_are_told_apart(make_vlm_trainer):
    def without_every_other(row, i):
        text = [{"type": "text", "text": question(i)}]
        return row if i % 2 else {"prompt": [{"role": "user", "content": text}], "images": []}

    rows = several_images().map(without_every_other, with_indices=True)
    with pytest.raises(ValueError, match=r"The prompt .*What color.* has no image, and others of its generation have"):
        make_vlm_trainer(rows, gradient_accumulation_steps=2).train()


def test_an_adapter_learns_from_images(make_vlm_trainer):
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    options = {"temperature": 0.7, "max_steps": 2, "loss_type": "dapo"}
    trainer = make_vlm_trainer(one_image(8), trainer_options={"peft_config": lora}, **options)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert all("lora" in name for name in changed)


def test_a_model_that_reads_no_images_and_prompts_without_a_place_for_them(make_trainer, make_vlm_trainer, walks):
    with pytest.raises(
        ValueError, match=r"The column 'image' holds images, and the model reads no images: it has a tok"
    ):
        make_trainer(walks.add_column("image", [None] * len(walks)))
    plain = walks.add_column("images", [[]] * len(walks))
    with pytest.raises(ValueError, match=r"The column 'images' holds images, and the prompts are plain texts"):
        make_vlm_trainer(plain)
