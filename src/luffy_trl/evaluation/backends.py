"""lm-eval's Hugging Face and vLLM back ends, which here also say how long each response was and whether it was cut."""

from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook, TemplateLM
from lm_eval.models.hf_vlms import HFMultimodalLM
from lm_eval.models.huggingface import HFLM
from transformers import BatchFeature

from ..runs.seeds import derived_seed
from . import EvaluationError
from .model_files import read_adapter_config


# Back end -> its argument for a LoRA adapter
ADAPTER_ARGUMENTS = {"hf": "peft", "vllm": "lora_local_path"}
# The ranks that vLLM is built for (`MaxLoRARanks` in vllm/config/lora.py)
VLLM_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class Request:
    """One response to be sampled: where it belongs, the rendered prompt, and lm-eval's generation arguments.

    The prompt's images are read when they are needed: those of a whole dataset may not fit into memory.
    """

    task: str
    doc_id: int
    repeat: int
    prompt: str
    generation: dict[str, Any]
    images: Callable[[], list[Any]] = list

    @property
    def key(self) -> tuple[str, int, int]:
        return self.task, self.doc_id, self.repeat


@dataclass(frozen=True)
class Response:
    text: str
    tokens: int  # the end-of-sequence token included
    truncated: bool


class ReportsLengths(TemplateLM):
    """Mixed into a back end of lm-eval, whose `generate_until` returns text alone.

    The tokens of each response are seen in `_model_generate`, and its text where the back end reports it to lm-eval's
    cache, one by one and in the same order.
    """

    backend_name: str
    add_bos_token: bool | None

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._lengths: deque[tuple[int, bool]] = deque()
        self._reported: dict[tuple[str, str], Response] = {}
        self.set_cache_hook(_Listener(self))

    @abstractmethod
    def seeded(self, requests: Sequence[Request], seed: int) -> list[dict[str, Any]]:
        """The generation arguments of each request, once what they do not seed is seeded.

        No two samples of a run may be drawn from the same random numbers: neither two repeats, nor one made before a
        restart and one after it.
        """

    def take_rendered_prompts(self) -> None:
        """Prompts come with their special tokens, as a chat template writes them: none is added."""
        if self.add_bos_token is None:
            self.add_bos_token = False

    def prompt_length(self, request: Request) -> int:
        """In tokens."""
        return len(self.tok_encode(request.prompt))

    def beside(self, request: Request) -> tuple[Any, ...]:
        """What lm-eval's back end is given beside the prompt and the generation arguments."""
        return ()

    def sample(self, requests: Sequence[Request], seed: int) -> list[Response]:
        """Generate in one call of lm-eval's back end."""
        arguments = self.seeded(requests, seed)
        instances = [
            Instance("generate_until", {}, (request.prompt, kwargs, *self.beside(request)), 0)
            for request, kwargs in zip(requests, arguments, strict=True)
        ]
        self._lengths.clear()
        self._reported.clear()
        texts = self.generate_until(instances, disable_tqdm=True)
        return [self._reported[request.prompt, text] for request, text in zip(requests, texts, strict=True)]


class _Listener(CacheHook):
    def __init__(self, backend: ReportsLengths):
        super().__init__(None)
        self.backend = backend

    def add_partial(self, attr: str, req: Any, res: str) -> None:
        tokens, truncated = self.backend._lengths.popleft()
        self.backend._reported[req[0], res] = Response(res, tokens, truncated)


class HuggingFaceBackend(ReportsLengths, HFLM):
    """Rows of a batch share torch's generator: it is seeded anew for each call, from the samples to be drawn."""

    backend_name = "hf"

    def seeded(self, requests: Sequence[Request], seed: int) -> list[dict[str, Any]]:
        torch.manual_seed(derived_seed(seed, [request.key for request in requests]))
        return [request.generation for request in requests]

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **generation_kwargs):
        output = super()._model_generate(context, max_length=max_length, stop=stop, **generation_kwargs)
        self._keep_lengths(output, context.shape[1], max_length)
        return output

    def _keep_lengths(self, output: torch.Tensor, prompt: int, longest: int) -> None:
        """
        Args:
            output: `(B, T)`, prompts and responses.
            prompt, longest: tokens that all prompts have, padding included, and that prompt and response may have.
        """
        for row in output[:, prompt:].tolist():
            end = next((i for i, token in enumerate(row) if token in self._end_tokens), None)
            self._lengths.append((len(row) if end is None else end + 1, end is None and prompt + len(row) >= longest))

    @property
    def _end_tokens(self) -> set[int]:
        eos = self.model.generation_config.eos_token_id
        return {self.eot_token_id, *(eos if isinstance(eos, list) else [eos])}


class HuggingFaceImagesBackend(HuggingFaceBackend, HFMultimodalLM):
    """For prompts with images, which the model's processor reads as it does in training."""

    def _create_tokenizer(self, pretrained, tokenizer, **kwargs):
        super()._create_tokenizer(tokenizer or pretrained, None, **kwargs)  # which forgets the processor of another

    def prompt_length(self, request: Request) -> int:
        return self._read([request.prompt], [request.images()])["input_ids"].shape[1]

    def beside(self, request: Request) -> tuple[Any, ...]:
        return ({"visual": request.images()},)

    def _read(self, prompts: list[str], images: list[list[Any]]) -> BatchFeature:
        bos = self.tokenizer.bos_token
        # As Transformers' `apply_chat_template`, with which the trainer tokenizes
        special = {"add_special_tokens": False} if bos is not None and prompts[0].startswith(bos) else {}
        return self.processor(
            images=images if any(images) else None,
            text=prompts,
            padding=True,
            padding_side="left",
            return_tensors="pt",
            **special,
        )

    def tok_batch_multimodal_encode(self, strings, images, *_, **__) -> BatchFeature:
        return self._read(strings, images).to(self.device, self.model.dtype)

    def _model_multimodal_generate(self, inputs, max_length, stop, **generation_kwargs):
        output = super()._model_multimodal_generate(inputs, max_length, stop, **generation_kwargs)
        self._keep_lengths(output, inputs["input_ids"].shape[1], max_length)
        return output


def vllm_backend() -> type[ReportsLengths]:
    """The vLLM back end, whose import needs vLLM."""
    from lm_eval.models.vllm_causallms import VLLM

    class VLLMBackend(ReportsLengths, VLLM):
        """Each request has its own seed: what it draws depends on no other, and not on data-parallel replicas."""

        backend_name = "vllm"

        def seeded(self, requests: Sequence[Request], seed: int) -> list[dict[str, Any]]:
            return [request.generation | {"seed": derived_seed(seed, request.key)} for request in requests]

        def _model_generate(self, requests, generate=False, sampling_params=None):
            outputs = super()._model_generate(requests, generate=generate, sampling_params=sampling_params)
            for output in outputs:
                [completion] = output.outputs
                self._lengths.append((len(completion.token_ids), completion.finish_reason == "length"))
            return outputs

    return VLLMBackend


def load_backend(name: str, arguments: dict[str, Any], images: bool = False) -> ReportsLengths:
    """The model, loaded.

    Args:
        name: "hf" or "vllm".
        arguments: those of lm-eval's `HFLM` or `VLLM`.
        images: whether prompts have any; "hf" only.
    """
    if name == "vllm":
        return vllm_backend()(**arguments)
    return (HuggingFaceImagesBackend if images else HuggingFaceBackend)(**arguments)


def adapter_arguments(backend: str, adapter: str) -> dict[str, Any]:
    """What loads a LoRA adapter from a local directory.

    Raises:
        EvaluationError: if there is none, or its rank is more than vLLM takes.
    """
    config = read_adapter_config(adapter, "--adapter")
    arguments: dict[str, Any] = {ADAPTER_ARGUMENTS[backend]: adapter}
    if backend == "vllm":
        rank = config.get("r")
        if not isinstance(rank, int):
            raise EvaluationError(f"--adapter {adapter}: its adapter_config.json has no rank `r`, but vLLM needs it.")
        fitting = [size for size in VLLM_LORA_RANKS if size >= rank]
        if not fitting:
            raise EvaluationError(
                f"--adapter {adapter} has rank {rank}, more than vLLM's {VLLM_LORA_RANKS[-1]}: merge it."
            )
        arguments["max_lora_rank"] = fitting[0]
    return arguments
