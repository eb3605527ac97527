"""The model as lm-eval's evaluator sees it: prompts from a named template, responses kept as they come."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from tqdm import tqdm

from . import EvaluationError
from .backends import ReportsLengths, Request
from .samples import Sample, SampleStore, prompt_hash
from .templates import OWN, TEXT_TEMPLATES


class KeepingLM(LM):
    """Hands on to the back end only requests without a kept sample, chunk by chunk, and keeps each chunk.

    Args:
        backend: the loaded model; None where every sample is kept already.
        store: where samples are kept.
        template: name of the prompt template.
        seed: of the sampling.
        chunk_size: samples generated at a time: so many are lost to a kill at most.
        when_done: called with the finished requests before lm-eval asks for their results.
    """

    def __init__(
        self,
        backend: ReportsLengths | None,
        store: SampleStore,
        template: str,
        seed: int,
        chunk_size: int,
        when_done: Callable[[Sequence[Instance]], None],
    ):
        super().__init__()
        self.backend, self.store, self.template = backend, store, template
        self.seed, self.chunk_size, self.when_done = seed, chunk_size, when_done

    def generate_until(self, requests: list[Instance]) -> list[str]:
        numbered = list(_numbered(requests))
        if self.backend is not None:
            self._generate(self.backend, numbered)
        self.when_done(requests)
        return [self.store.samples[request.key].response for request in numbered]

    def _generate(self, backend: ReportsLengths, requests: list[Request]) -> None:
        """Make and keep what is missing."""
        _check_lengths(backend, requests)
        missing = [request for request in requests if not self._is_kept(request)]
        with tqdm(total=len(requests), initial=len(requests) - len(missing), desc="Samples", unit="") as bar:
            for start in range(0, len(missing), self.chunk_size):
                chunk = missing[start : start + self.chunk_size]
                responses = backend.sample(chunk, self.seed)
                self.store.append(
                    Sample(*request.key, prompt_hash(request.prompt), made.text, made.tokens, made.truncated)
                    for request, made in zip(chunk, responses, strict=True)
                )
                bar.update(len(chunk))

    def _is_kept(self, request: Request) -> bool:
        kept = self.store.samples.get(request.key)
        if kept is not None and kept.prompt_hash != prompt_hash(request.prompt):
            raise EvaluationError(
                f"--output_dir {self.store.directory}: the sample of {request.task}, problem {request.doc_id}, was "
                "made from another prompt than now, so the chat template or a library has changed. Choose another "
                "--output_dir."
            )
        return kept is not None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        if self.template != OWN:
            return TEXT_TEMPLATES[self.template](chat_history[-1]["content"])
        if self.backend is None:  # nobody reads it
            return chat_history[-1]["content"]
        prompt = self.backend.apply_chat_template(chat_history, add_generation_prompt=add_generation_prompt)
        for message in chat_history:
            # lm-eval leaves a system message out where the template refuses it
            if message["content"].strip() not in prompt:
                raise EvaluationError(
                    f"the model's chat template does not render the {message['role']} message it is given: leave out "
                    "--system_prompt, or choose another --template."
                )
        return prompt

    @property
    def tokenizer_name(self) -> str:
        return ""  # of lm-eval's request cache, which is not used

    def loglikelihood(self, requests):
        raise NotImplementedError("The tasks of luffy_trl are generated, not ranked by likelihood.")

    loglikelihood_rolling = loglikelihood


def _numbered(requests: Sequence[Instance]) -> Iterator[Request]:
    """lm-eval repeats a request `repeats` times; the repeats are told apart by their order."""
    seen: Counter[tuple[str, int]] = Counter()
    for instance in requests:
        task, doc_id = str(instance.task_name), int(instance.doc_id or 0)
        yield Request(task, doc_id, seen[task, doc_id], *instance.args)
        seen[task, doc_id] += 1


def _check_lengths(backend: ReportsLengths, requests: list[Request]) -> None:
    """lm-eval would cut what does not fit, at the beginning of the prompt or at the end of the response.

    Raises:
        EvaluationError: if the longest prompt and response are more than the model's window.
    """
    lengths = {r.prompt: (len(backend.tok_encode(r.prompt)), r) for r in requests}
    longest, where = max(lengths.values(), key=lambda value: value[0])
    max_new_tokens = where.generation["max_gen_toks"]
    window = backend.max_length
    if longest + max_new_tokens > window:
        raise EvaluationError(
            f"--max_new_tokens {max_new_tokens} does not fit: the longest prompt ({where.task}, problem "
            f"{where.doc_id}) has {longest} tokens, and the model's window {window}. At most "
            f"{max(window - longest, 0)} fit; luffy-trl prepare-model extends the window as the paper did."
        )
