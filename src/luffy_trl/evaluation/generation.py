"""The model as lm-eval's evaluator sees it: prompts from a named template, responses kept as they come."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from . import EvaluationError
from .backends import Request
from .sampling import Sampler
from .templates import OWN, TEXT_TEMPLATES


class KeepingLM(LM):
    """Hands all requests on to a sampler, which makes those without a kept sample.

    Args:
        sampler: makes and keeps samples.
        template: name of the prompt template.
        when_done: called with the finished requests before lm-eval asks for their results.
    """

    def __init__(self, sampler: Sampler, template: str, when_done: Callable[[Sequence[Instance]], None]):
        super().__init__()
        self.sampler, self.template, self.when_done = sampler, template, when_done

    def generate_until(self, requests: list[Instance]) -> list[str]:
        numbered = list(_numbered(requests))
        self.sampler.make(numbered)
        self.when_done(requests)
        return [self.sampler.store.samples[request.key].response for request in numbered]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        if self.template != OWN:
            return TEXT_TEMPLATES[self.template](chat_history[-1]["content"])
        if self.sampler.backend is None:  # nobody reads it
            return chat_history[-1]["content"]
        prompt = self.sampler.backend.apply_chat_template(chat_history, add_generation_prompt=add_generation_prompt)
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
