"""Teachers in this process, through vLLM."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..demonstrations.encoding import stop_tokens
from ..demonstrations.prompts import Reader
from ..runs.fingerprints import files_fingerprint
from .answers import MODEL_FILES, TeacherAnswer
from .models import fitting, load_reader, prompt_ids_of
from .teachers import Keep, Question, Sampling


@dataclass
class VLLMTeacher:
    """
    Args:
        path: a directory or a Hub id.
        options: more arguments of vLLM's `LLM`, such as tensor_parallel_size.
        chunk_size: answers made, then kept, at a time.
    """

    name: str
    path: str
    sampling: Sampling
    dtype: str
    options: Mapping[str, Any]
    chunk_size: int

    def settings(self) -> dict[str, Any]:
        own = {"teacher_model_name_or_path": self.path, MODEL_FILES: files_fingerprint(self.path), "dtype": self.dtype}
        return own | {"teacher_backend": "vllm"} | asdict(self.sampling)

    def answer(self, questions: Sequence[Question], keep: Keep) -> None:
        from vllm import LLM

        reader = load_reader(self.path, "--teacher_model_name_or_path")
        reader = replace(reader, max_window=self.options.get("max_model_len"))
        stops = stop_tokens(self.path, reader.tokenizer)
        llm = LLM(model=self.path, **{"dtype": self.dtype, "seed": self.sampling.seed, **self.options})
        for start in range(0, len(questions), self.chunk_size):
            chunk = questions[start : start + self.chunk_size]
            prompts = [prompt_ids_of(reader, question.prompt) for question in chunk]
            asked, refused = fitting(reader, chunk, prompts)
            keep(refused + (self._generate(llm, reader, stops, asked) if asked else []))

    def _generate(
        self, llm: Any, reader: Reader, stops: list[int], asked: list[tuple[Question, list[int]]]
    ) -> list[TeacherAnswer]:
        prompts = [{"prompt_token_ids": ids} for _, ids in asked]
        how = [self._sampling_params(question, stops) for question, _ in asked]
        outputs = llm.generate(prompts, sampling_params=how, use_tqdm=False)
        return [
            self._answer(reader, stops, question, len(ids), output.outputs[0])
            for (question, ids), output in zip(asked, outputs, strict=True)
        ]

    def _sampling_params(self, question: Question, stops: list[int]) -> Any:
        from vllm import SamplingParams

        return SamplingParams(
            temperature=self.sampling.temperature,
            top_p=self.sampling.top_p,
            max_tokens=self.sampling.max_tokens,
            seed=question.seed(self.sampling.seed),
            stop_token_ids=stops,
            logprobs=0 if self.sampling.logprobs else None,  # of the sampled token alone
        )

    def _answer(self, reader: Reader, stops: list[int], question: Question, prompt: int, made: Any) -> TeacherAnswer:
        ids = list(made.token_ids)
        ended = bool(ids) and ids[-1] in stops
        logps = None
        if self.sampling.logprobs:
            logps = [entry[token].logprob for entry, token in zip(made.logprobs, ids, strict=True)]
        return TeacherAnswer(
            *(question.teacher, question.problem, question.repeat),
            finish="stop" if ended else "length",
            text=reader.tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=True),
            prompt_tokens=prompt,
            completion_tokens=len(ids),
            token_ids=ids,
            logps=logps,
        )
