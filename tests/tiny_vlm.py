"""Tiny vision-language models, and squares in colours to look at; nothing is downloaded, without torchvision.

Processors that read images alone, such as LLaVA's and Gemma 3's, do with Pillow. Those that read videos too, such as
Qwen's, need torchvision for these: here one of its own leaves them out.
"""

from typing import Any

from datasets import Dataset, Features, Image, List, Value
from PIL.Image import Image as Picture
from PIL.Image import new
from tokenizers import pre_tokenizers
from transformers import (
    AutoProcessor,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    Gemma3TextConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Config,
    Qwen2Tokenizer,
    SiglipVisionConfig,
    set_seed,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil


TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
COLORS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "grey": (128, 128, 128)}
# In pixels; a patch has 14 a side, and four of them are a token
SIZES = ((28, 28), (28, 56), (56, 56), (56, 28))


class ImageProcessor(Qwen2_5_VLProcessor):
    """Qwen's without its reader of videos, which needs another package."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        tokens = [self.image_token, self.video_token]
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids(tokens)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


class _Named(PreTrainedConfig):
    """Of no model: processors are found by the name in their own files, among those that have one."""


AutoProcessor.register(_Named, ImageProcessor)


def build_processor() -> ImageProcessor:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    special += ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    vocabulary = {token: i for i, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[], eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": special[1:]})
    tokenizer.padding_side = "left"
    images = Qwen2VLImageProcessorPil(size={"shortest_edge": 28 * 28, "longest_edge": 56 * 56})
    return ImageProcessor(images, tokenizer, chat_template=TEMPLATE)


def build_model(processor: ImageProcessor) -> Qwen2_5_VLForConditionalGeneration:
    """Randomly initialised, of two layers for texts and two for images."""
    tokenizer, convert = processor.tokenizer, processor.tokenizer.convert_tokens_to_ids
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
        "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32,
        "fullatt_block_indexes": [1], "window_size": 28, "initializer_range": 0.2,
    }  # fmt: skip
    set_seed(0)
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config=text,
            vision_config=vision,
            image_token_id=processor.image_token_id,
            video_token_id=processor.video_token_id,
            vision_start_token_id=convert("<|vision_start|>"),
            vision_end_token_id=convert("<|vision_end|>"),
            tie_word_embeddings=False,
        )
    )


SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
PATCHES = {"image_size": 28, "patch_size": 14}
IN_TEMPLATE = "<|vision_start|><|image_pad|><|vision_end|>"


def of_texts(tokenizer: Qwen2Tokenizer) -> dict[str, Any]:
    return SMALL | {
        "vocab_size": len(tokenizer), "num_key_value_heads": 2, "max_position_embeddings": 512,
        "initializer_range": 0.2, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip


# How either LLaVA's processor reads an image
LLAVA_READS = {
    "patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1,
    "chat_template": TEMPLATE.replace(IN_TEMPLATE, "<image>"),
}  # fmt: skip


def llava_parts(tokenizer: Qwen2Tokenizer) -> dict[str, Any]:
    return {
        "vision_config": CLIPVisionConfig(**SMALL, **PATCHES, projection_dim=32, initializer_range=0.2),
        "text_config": Qwen2Config(**of_texts(tokenizer)),
        "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
    }


def build_llava() -> tuple[ProcessorMixin, PreTrainedModel]:
    """Images of 28 pixels a side in four patches, whatever they were."""
    tokenizer = build_processor().tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        tokenizer,
        **LLAVA_READS,
    )
    config = LlavaConfig(
        **llava_parts(tokenizer),
    )
    set_seed(0)
    return processor, LlavaForConditionalGeneration(config)


def build_llava_next() -> tuple[ProcessorMixin, PreTrainedModel]:
    """An image in tiles, as many as its form takes, with its size beside them."""
    tokenizer = build_llava()[0].tokenizer
    forms = [[28, 56], [56, 28], [56, 56]]
    size, crop = {"shortest_edge": 28}, {"height": 28, "width": 28}
    processor = LlavaNextProcessor(
        LlavaNextImageProcessorPil(size=size, crop_size=crop, image_grid_pinpoints=forms),
        tokenizer,
        **LLAVA_READS,
    )
    config = LlavaNextConfig(
        **llava_parts(tokenizer),
        image_grid_pinpoints=forms,
    )
    set_seed(0)
    return processor, LlavaNextForConditionalGeneration(config)


def build_gemma3() -> tuple[ProcessorMixin, PreTrainedModel]:
    """Four tokens an image, which see each other: `token_type_ids` say which they are."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<boi>", "<eoi>", "<image>"]
    vocabulary = {token: i for i, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    named = {"boi_token": "<boi>", "eoi_token": "<eoi>", "image_token": "<image>"}
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary, merges=[], eos_token=special[2], pad_token=special[0], extra_special_tokens=named
    )
    tokenizer.padding_side = "left"
    images = Gemma3ImageProcessorPil(size={"height": 28, "width": 28})
    template = TEMPLATE.replace(IN_TEMPLATE, "<boi>")
    processor = Gemma3Processor(images, tokenizer, chat_template=template, image_seq_length=4)
    config = Gemma3Config(
        text_config=Gemma3TextConfig(**of_texts(tokenizer), head_dim=8, sliding_window=64),
        vision_config=SiglipVisionConfig(**SMALL, **PATCHES, vision_use_head=False),
        mm_tokens_per_image=4,
        **{f"{name}_index": vocabulary[token] for name, token in named.items()},
    )
    set_seed(0)
    return processor, Gemma3ForConditionalGeneration(config)


def square(color: str, number: int = 0) -> Picture:
    return new("RGB", SIZES[number % len(SIZES)], COLORS[color])


def question(number: int) -> str:
    return f"What color{'?' * (number + 1)}"


def one_image(rows: int = 4) -> Dataset:
    """A question about an image in a column of its own, with the color for a demonstration; each row has its own."""
    colors = [list(COLORS)[i % len(COLORS)] for i in range(rows)]
    columns = {
        "prompt": [[{"role": "user", "content": question(i)}] for i in range(rows)],
        "image": [square(color, i) for i, color in enumerate(colors)],
        "completion": [[{"role": "assistant", "content": color}] for color in colors],
    }
    messages = List({"role": Value("string"), "content": Value("string")})
    return Dataset.from_dict(columns, features=Features(prompt=messages, image=Image(), completion=messages))


def several_images(rows: int = 4) -> Dataset:
    """The same with one or two images a row, in their places among the parts of a message."""
    plain = one_image(rows)
    pictures = [[square(list(COLORS)[i % 4], i + j) for j in range(1 + i % 2)] for i in range(rows)]
    image = {"type": "image", "text": None}
    contents = [[*[image] * len(images), {"type": "text", "text": question(i)}] for i, images in enumerate(pictures)]
    message = {"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})}
    prompts = [[{"role": "user", "content": content}] for content in contents]
    columns = {"prompt": prompts, "images": pictures, "completion": plain["completion"]}
    features = Features(prompt=List(message), images=List(Image()), completion=plain.features["completion"])
    return Dataset.from_dict(columns, features=features)
