"""TrajectoriesMixin: a GRPOTrainer in whose groups some rows have acted already, with tools or without."""

import asyncio
import inspect
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from accelerate.logging import get_logger
from accelerate.utils import gather_object
from trl import GRPOTrainer, prepare_multimodal_messages

from .encoding import DemonstrationEncoder
from .images import Tokenized, as_tensors, without_empty_images
from .placement import Generation, tool_masks
from .rendering import Tools, schemas, tools_of


if TYPE_CHECKING:
    from ..config import LuffyConfig


logger = get_logger(__name__)


class TrajectoriesMixin(GRPOTrainer):
    """
    GRPOTrainer that replays recorded trajectories beside rollouts that act.

    What differs from [`~trl.GRPOTrainer`], override by override:

    - `_generate_and_score_completions`, `_tokenize_prompts`: where the trainer has no `tools`, a prompt is rendered
      with those in its column `tools`;
    - `_tool_call_loop`: leaves demonstrations out, but repeats their calls in their rows' environments, which give
      rewards; every process samples as often as the one that acts longest;
    - `_generate_single_turn`: so that they do;
    - `_generate`: a trajectory's messages are its completion, and its `tool_mask` is 0 where tools and users wrote;
    - `_tokenize_prompts`, `log`, and a hook of the model: images beside tools, and tools that answer with images,
      where processors give arrays, forward passes have no image, and completions are logged.
    """

    _generation: Generation | None = None
    # What is under way, None and False outside of it
    _rows_under_way: list[dict[str, Any]] | None = None
    _acts = False
    _batch_environments: list[str | None]  # TRL's

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self._is_vlm and self.tools:
            hook = partial(without_empty_images, self._dist.is_zero3 or self._dist.is_fsdp)
            for model in filter(None, (self.model, self.ref_model)):
                model.register_forward_pre_hook(hook, with_kwargs=True)

    def _encoder(self) -> DemonstrationEncoder:
        """Makes demonstrations of what rollouts are made of: the same template, and the same tools in it."""
        args: LuffyConfig = self.args
        # TRL trades a template that rewrites history for another
        template = {} if self.chat_template is None else {"chat_template": self.chat_template}
        if self.environment_factories is None:
            tools = Tools(schemas(self.tools))
        else:
            tools = Tools(of_environments={name: schemas(own) for name, own in self._env_tools.items()})
        return DemonstrationEncoder(
            self.processing_class,
            self.eos_token_ids,
            self.max_completion_length,
            args.demonstration_overflow,
            {**self.chat_template_kwargs, **template},
            tools,
            gives_prefixes=args.prefix_strategy != "fixed" or args.prefix_max < 1,
        )

    def _generate_and_score_completions(self, inputs):
        self._rows_under_way = inputs
        try:
            return super()._generate_and_score_completions(inputs)
        finally:
            self._rows_under_way = None

    def _tokenize_prompts(self, prompts):
        rows = self._rows_under_way
        if self.tools or rows is None or not any(row.get("tools") for row in rows):
            ids, images, fields = super()._tokenize_prompts(prompts)
            return ids, images, as_tensors(fields)
        prompt_ids: list[list[int]] = []
        merged: dict[str, list] = {}
        for number, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
            tools = tools_of(row, f"Row {number} of a generation")
            with self._rendering_with(tools or []):
                [ids], images, fields = super()._tokenize_prompts([prompt])
            if images:  # of a stream; of a table they are refused before training
                raise ValueError("The column `tools` cannot be combined with images. Leave one of them out.")
            prompt_ids.append(ids)
            for name, values in fields.items():  # a value a token
                merged.setdefault(name, []).extend(values)
        return prompt_ids, None, merged

    def _tokenize_rows(self, rows: Sequence[int]) -> Tokenized:
        """Prompts of the generation under way once more, each with the tools of its environment."""
        assert self._generation is not None
        prompts = [self._generation.prompts[i] for i in rows]
        if self.environment_factories is None:
            return super()._tokenize_prompts(prompts)
        of_all = self._batch_environments
        self._batch_environments = [of_all[i] for i in rows]
        try:
            return super()._tokenize_prompts(prompts)
        finally:
            self._batch_environments = of_all

    @contextmanager
    def _rendering_with(self, tools: list[dict[str, Any]]) -> Iterator[None]:
        """In here TRL renders prompts with these schemas, which nobody can call."""
        self.tools = tools
        try:
            yield
        finally:
            self.tools = []

    def _generate(self, prompts):
        generation = self._generation
        if generation is not None:
            generation.prompts = prompts
        prompt_ids, completion_ids, tool_mask, completions, *others = super()._generate(prompts)
        if generation is not None:
            placed = generation.placement.demonstrations
            tool_mask = tool_masks(placed, completion_ids, tool_mask)
            completions = [
                [*map(dict, d.messages)] if d is not None and d.messages else completion
                for d, completion in zip(placed, completions, strict=True)
            ]
            generation.tool_mask = tool_mask
        return prompt_ids, completion_ids, tool_mask, completions, *others

    def _tool_call_loop(self, prompts, prompt_ids, completion_ids, completions, *others):
        generation = self._generation
        acted = [False] * len(prompts)
        if generation is not None:
            acted = [d is not None and not d.continued for d in generation.placement.demonstrations]
            if self.environments:
                self._repeat_calls(generation)
        # A completion without calls is one that TRL leaves alone
        shown = [[{}] if has_acted else own for has_acted, own in zip(acted, completions, strict=True)]
        with self._acting():
            mask, said, *results = super()._tool_call_loop(prompts, prompt_ids, completion_ids, shown, *others)
        said = [own if has_acted else new for has_acted, own, new in zip(acted, completions, said, strict=True)]
        if generation is not None:
            mask = tool_masks(generation.placement.demonstrations, results[0], mask)
        return mask, said, *results

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._is_vlm and self.tools and self.log_completions:  # a column of a table holds texts or parts, not both
            kept = self._logs["completion"]
            self._logs["completion"] = deque(map(prepare_multimodal_messages, kept), maxlen=kept.maxlen)
        super().log(logs, start_time)

    @contextmanager
    def _acting(self) -> Iterator[None]:
        """TRL's loop. Sampling may be collective: who has nothing left to ask samples on, until nobody has."""
        self._acts = True
        try:
            yield
            while (most := max(gather_object([0]))) > 0:
                super()._generate_single_turn([[self._tokenizer.eos_token_id]] * most, None, {}, 1)
        finally:
            self._acts = False

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        sample, own = super()._generate_single_turn, len(prompt_ids)
        if not self._acts:
            return sample(prompt_ids, images, multimodal_fields, num_generations, has_tool_images)
        most = max(gather_object([own]))
        if self.use_vllm:  # its server hands each process as many answers
            prompt_ids = prompt_ids + prompt_ids[-1:] * (most - own)
            images = images and images + images[-1:] * (most - own)
        sampled, logps = sample(prompt_ids, images, multimodal_fields, num_generations, has_tool_images)
        return sampled[:own], logps if logps is None else logps[:own]

    def _repeat_calls(self, generation: Generation) -> None:
        """What recorded trajectories have done, done in their rows' environments: the rewards are of these."""
        for row, demonstration in enumerate(generation.placement.demonstrations):
            for call in _calls(demonstration.messages if demonstration is not None else ()):
                name = call["name"]
                function = self._sync_tool_dicts[row].get(name) or self._async_tool_dicts[row].get(name)
                if function is None:
                    logger.warning_once(f"A demonstration calls {name}, which its environment does not have.")
                if not inspect.ismethod(function):  # one of `tools`, which is nobody's state
                    continue
                try:
                    self._called(function, call["arguments"])
                except Exception as error:  # a tool may raise anything, which is an answer, as in TRL's loop
                    logger.warning_once(f"A demonstration's call of {name} in its environment ended with {error!r}.")

    def _called(self, function: Callable, arguments: dict[str, Any]) -> Any:
        answer = function(**arguments)
        if asyncio.iscoroutine(answer):
            return asyncio.run_coroutine_threadsafe(answer, self.async_loop).result(self.args.ddp_timeout)
        return answer


def _calls(messages: Any) -> Iterator[dict[str, Any]]:
    for message in messages:
        for call in message.get("tool_calls") or []:
            yield call["function"]
