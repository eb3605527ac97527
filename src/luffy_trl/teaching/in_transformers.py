"""Teachers in this process, through Transformers: any causal language model; a CPU will do."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from ..demonstrations.encoding import stop_tokens
from ..demonstrations.prompts import Reader
from ..runs.fingerprints import files_fingerprint
from ..runs.seeds import derived_seed
from .answers import MODEL_FILES, TeacherAnswer
from .likelihood import completion_logps
from .models import fitting, load_model, load_reader, prompt_ids_of
from .teachers import Keep, Question, Sampling


@dataclass
class TransformersTeacher:
    """
    Args:
        path: a directory or a Hub id.
        device: None for a GPU where there is one.
    """

    name: str
    path: str
    sampling: Sampling
    dtype: str
    device: str | None
    batch_size: int

    def settings(self) -> dict[str, Any]:
        own = {"teacher_model_name_or_path": self.path, MODEL_FILES: files_fingerprint(self.path), "dtype": self.dtype}
        return own | {"teacher_backend": "transformers"} | asdict(self.sampling)

    def answer(self, questions: Sequence[Question], keep: Keep) -> None:
        reader, model = load_reader(self.path, "--teacher_model_name_or_path"), self._load()
        stops = stop_tokens(self.path, reader.tokenizer)
        for start in range(0, len(questions), self.batch_size):
            batch = list(questions[start : start + self.batch_size])
            prompts = [prompt_ids_of(reader, question.prompt) for question in batch]
            asked, refused = fitting(reader, batch, prompts)
            try:
                keep(refused + (self._generate(reader, model, stops, asked) if asked else []))
            except torch.OutOfMemoryError as error:
                raise ValueError(
                    f"--batch_size {self.batch_size} is too much for the memory of the device with {self.path}: lower "
                    "it, or --max_tokens."
                ) from error

    def _load(self) -> Any:
        return load_model(self.path, self.dtype, self.device, "--teacher_model_name_or_path")

    def _generate(
        self, reader: Reader, model: Any, stops: list[int], asked: list[tuple[Question, list[int]]]
    ) -> list[TeacherAnswer]:
        tokenizer, longest = reader.tokenizer, max(len(ids) for _, ids in asked)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stops[0]
        rows = [[pad] * (longest - len(ids)) + ids for _, ids in asked]
        mask = [[0] * (longest - len(ids)) + [1] * len(ids) for _, ids in asked]
        # Rows of a batch share torch's generator
        torch.manual_seed(derived_seed(self.sampling.seed, [[q.teacher, q.problem, q.repeat] for q, _ in asked]))
        window = reader.window()
        limit = self.sampling.max_tokens if window is None else min(self.sampling.max_tokens, window - longest)
        output = model.generate(
            input_ids=torch.tensor(rows, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            generation_config=self._generation(stops, pad, limit),
        )
        made = [_until(stops, ids) for ids in output[:, longest:].tolist()]
        return [self._answer(reader, model, stops, *one, ids) for one, ids in zip(asked, made, strict=True)]

    def _generation(self, stops: list[int], pad: int, limit: int) -> GenerationConfig:
        how: dict[str, Any] = {"do_sample": False}
        if self.sampling.temperature > 0:
            sampling = {"temperature": self.sampling.temperature, "top_p": self.sampling.top_p, "top_k": 0}
            how = {"do_sample": True, **sampling}
        return GenerationConfig(max_new_tokens=limit, eos_token_id=stops, pad_token_id=pad, **how)

    def _answer(
        self, reader: Reader, model: Any, stops: list[int], question: Question, prompt: list[int], ids: list[int]
    ) -> TeacherAnswer:
        ended = bool(ids) and ids[-1] in stops
        return TeacherAnswer(
            *(question.teacher, question.problem, question.repeat),
            finish="stop" if ended else "length",
            text=reader.tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=True),
            prompt_tokens=len(prompt),
            completion_tokens=len(ids),
            token_ids=ids,
            logps=completion_logps(model, prompt, ids) if self.sampling.logprobs and ended else None,
        )


def _until(stops: list[int], ids: list[int]) -> list[int]:
    """The tokens up to the first at which generation stops; padding follows it."""
    end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
    return ids[: end + 1]
