"""`luffy-trl eval` of prompts with images, as the trainer shows them to the model; on tiny Qwen2.5-VL and LLaVA."""

import json

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from luffy_trl.commands.eval import main

from .test_own_problems import error_of, options, samples_in, write
from .tiny_vlm import COLORS, build_llava, build_model, build_processor, one_image, question, several_images, square


TEXT = {"role": "user", "content": [{"type": "text", "text": "?"}]}


@pytest.fixture(scope="module")
def vlm_dirs(tmp_path_factory):
    processor = build_processor()
    made = {"qwen": (processor, build_model(processor)), "llava": build_llava()}
    directories = {}
    for name, (own, model) in made.items():
        directories[name] = tmp_path_factory.mktemp(name)
        own.save_pretrained(directories[name])
        model.save_pretrained(directories[name])
    return directories


def shown(prompts, images, completions, **kwargs) -> list[float]:
    """What rewards are given: TRL's prompts with the images in their places, and the column of images."""
    for prompt, own in zip(prompts, images, strict=True):
        seen = [part["image"] for message in prompt for part in message["content"] if part["type"] == "image"]
        assert [image.tobytes() for image in seen] == [image.tobytes() for image in own]
    return [float(len(completion[0]["content"])) for completion in completions]


def is_conversation(prompts, completions, **kwargs) -> list[float]:
    return [float(isinstance(prompt, list)) for prompt in prompts]


def greedy(directory, messages, images, longest: int) -> tuple[str, list[int]]:
    """A response to one prompt, and its tokens, by Transformers alone."""
    processor, model = AutoProcessor.from_pretrained(directory), AutoModelForImageTextToText.from_pretrained(directory)
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    seen = processor(images=images, text=[text], return_tensors="pt")
    with torch.no_grad():
        output = model.generate(**seen, max_new_tokens=longest, do_sample=False)
    tokens = output[0, seen["input_ids"].shape[1] :].tolist()
    ended = tokens[: tokens.index(model.generation_config.eos_token_id) + 1] if 2 in tokens else tokens
    return processor.tokenizer.decode(ended, skip_special_tokens=True), ended


@pytest.mark.parametrize("model", ["qwen", "llava"])
def test_greedy_answers_are_the_models_own_on_the_processors_output(vlm_dirs, model, tmp_path, capsys):
    data, output = tmp_path / "squares", tmp_path / "out"
    rows = several_images(6)
    rows.remove_columns("completion").save_to_disk(data)
    reward = "tests.test_image_problems.shown"
    arguments = options(vlm_dirs[model], data, output, reward, temperature=0, max_new_tokens=12, batch_size=4)
    main(arguments)
    samples = samples_in(output, "squares")
    assert len(samples) == 6
    for row, sample in zip(rows, samples, strict=True):
        response, ids = greedy(vlm_dirs[model], row["prompt"], row["images"], 12)
        assert (sample["response"], sample["tokens"]) == (response, len(ids))
        assert sample["rewards"]["shown"] == len(response)
        # the place of an image, and nothing of its pixels
        assert sample["prompt"].count("<|image_pad|>" if model == "qwen" else "<image>") == len(row["images"])
    assert len({sample["response"] for sample in samples}) > 1
    assert max(path.stat().st_size for path in output.rglob("*") if path.is_file()) < 5000
    # Other pixels are another dataset, for which the samples do not serve
    turned = rows.map(lambda row: {"images": [image.rotate(90, expand=True) for image in row["images"]]})
    turned.remove_columns("completion").save_to_disk(tmp_path / "other" / "squares")
    arguments[3] = str(tmp_path / "other" / "squares")
    assert "--output_dir" in error_of(arguments, capsys)


def test_an_image_matters_and_so_does_its_place(vlm_dirs, tmp_path):
    """The same question of each image, in a column; and in a message's parts as the path of a file."""
    paths = []
    for i, color in enumerate(COLORS):
        square(color, i).save(tmp_path / f"{color}.png")
        paths.append(str(tmp_path / f"{color}.png"))
    ask = {"role": "user", "content": "Color?"}
    in_column = [{"prompt": [ask], "image": path} for path in paths]
    parts = [[{"type": "text", "text": "Color?"}, {"type": "image", "image": path}] for path in paths]
    behind = [{"prompt": [{"role": "user", "content": own}]} for own in parts]
    responses = []
    for name, rows in [("column", in_column), ("parts", behind)]:
        data, output = write(tmp_path / name / "mine.jsonl", rows), tmp_path / f"out-{name}"
        reward = "tests.test_image_problems.is_conversation"
        main(options(vlm_dirs["qwen"], data, output, reward, temperature=0, max_new_tokens=8, batch_size=4))
        responses.append([sample["response"] for sample in samples_in(output)])
        for path, sample in zip(paths, samples_in(output), strict=True):
            content = [{"type": "text", "text": "Color?"}]
            content.insert(0 if name == "column" else 1, {"type": "image"})
            assert (
                sample["response"]
                == greedy(vlm_dirs["qwen"], [{"role": "user", "content": content}], [square_of(path)], 8)[0]
            )
    assert len(set(responses[0])) > 1
    assert responses[0] != responses[1]


def square_of(path: str):
    color = path.rsplit("/", 1)[1].removesuffix(".png")
    return square(color, list(COLORS).index(color))


def test_prompts_with_tools_and_images(vlm_dirs, tmp_path):
    """The chat template gets the tools of a row's column, the processor its image."""
    directory = tmp_path / "calls"
    processor, model = build_llava()
    processor.chat_template = "{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}" + (
        processor.chat_template
    )
    processor.save_pretrained(directory)
    model.save_pretrained(directory)
    rows = one_image(4).remove_columns("completion")
    tools = [json.dumps([{"type": "function", "function": {"name": f"tool_{i}"}}]) for i in range(4)]
    rows.add_column("tools", tools).save_to_disk(tmp_path / "mine")
    reward = "tests.test_image_problems.is_conversation"
    main(options(directory, tmp_path / "mine", tmp_path / "out", reward, temperature=0, max_new_tokens=4))
    for i, sample in enumerate(samples_in(tmp_path / "out")):
        assert sample["prompt"].startswith(f"tool_{i} <|im_start|>user\n<image>{question(i)}")


@pytest.mark.parametrize(
    ("change", "flags", "message"),
    [
        (lambda row: row, {"backend": "vllm"}, "are read with --backend hf alone. Take that."),
        (lambda row: row, {"template": "plain"}, "have no place in it. Take --template own."),
        (lambda row: row, {"batch_size": "auto"}, "lm-eval takes in batches of a given size alone. Give a number."),
        (lambda row: row, {"max_new_tokens": 490}, "--max_new_tokens 490 does not fit: the longest prompt (mine, pro"),
        (lambda row: row | {"image": None}, {}, "row 3: `prompt` has 1 places for images ({'type': 'image'}), and th"),
        (lambda row: {"prompt": [TEXT], "image": None}, {}, "row 3: the prompt has no image, and others have. Evalua"),
        (lambda row: row | {"image": "none.png"}, {}, "row 3: an image cannot be read: "),
        (lambda row: row | {"prompt": [{**TEXT, "content": [{"type": "image"}] * 2}]}, {}, ": `prompt` has 2 places"),
    ],
)
def test_what_cannot_be_is_told_in_one_sentence(vlm_dirs, change, flags, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("luffy_trl.commands.eval.find_spec", lambda name: name)  # vLLM is another environment's
    square("red").save(tmp_path / "red.png")
    parts = [{"type": "image"}, {"type": "text", "text": "?"}]
    row = {"prompt": [{"role": "user", "content": parts}], "image": str(tmp_path / "red.png")}
    data = write(tmp_path / "data" / "mine.jsonl", [row, row, row, change(row)])
    reward = "tests.test_image_problems.is_conversation"
    said = error_of(options(vlm_dirs["llava"], data, tmp_path / "out", reward, **flags), capsys)
    assert message in said


@pytest.mark.parametrize("where", ["column", "parts"])
def test_a_model_of_texts_is_not_shown_images(speaking_model, where, tmp_path, capsys):
    image = {"type": "image", "image": "red.png"}
    content = "?" if where == "column" else [image, {"type": "text", "text": "?"}]
    row = {"prompt": [{"role": "user", "content": content}]} | ({"image": "red.png"} if where == "column" else {})
    data = write(tmp_path / "data" / "mine.jsonl", [row])
    reward = "tests.test_image_problems.is_conversation"
    said = error_of(options(speaking_model, data, tmp_path / "out", reward), capsys)
    assert "and the model reads no images: it has a tokenizer and no processor. Take a vision-language model" in said
