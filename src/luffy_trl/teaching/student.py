"""The policy that will be trained, as far as demonstrations are concerned: its template, its tokens, its log-probs."""

from collections.abc import Sequence
from functools import cached_property
from itertools import groupby
from typing import Any

from ..demonstrations.agreement import disagreements
from ..demonstrations.encoding import DemonstrationEncoder, stop_tokens
from ..demonstrations.prompts import check_prompts
from .answers import TeacherAnswer
from .likelihood import completion_logps
from .models import load_model, load_reader, prompt_ids_of
from .problems import Prompt


STUDENT_FLAG = "--student"
# The trainer leaves out what is longer than its own limit, and says so
NO_LIMIT = 1 << 40
# What decoding makes of bytes that are no whole character
PART_OF_A_CHARACTER = "\ufffd"


class Student:
    """
    Args:
        name: a directory or a Hub id.
        dtype, device: of its weights, which are loaded when they are needed.
    """

    def __init__(self, name: str, dtype: str, device: str | None):
        self.name, self.dtype, self.device = name, dtype, device
        self.reader = load_reader(name, STUDENT_FLAG)
        stops = stop_tokens(name, self.reader.tokenizer)
        self.encoder = DemonstrationEncoder(self.reader.tokenizer, stops, NO_LIMIT, "error", {})

    def check(self, problems: Sequence[dict[str, Any]]) -> list[str]:
        """Sentences on prompts that do not reach the student whole.

        Args:
            problems: rows with a `prompt`, a dataset.

        Raises:
            ValueError: naming the row whose prompt its template refuses.
        """
        return check_prompts(self.reader, problems, "", None)

    def token_ids(self, prompt: Prompt, text: str) -> list[int]:
        """What the student would have had to sample, its end included.

        Raises:
            ValueError: if it could never write this after the prompt.
        """
        if said := disagreements(self.reader.processing_class, [{"prompt": prompt, "completion": text}]):
            raise ValueError(said[0])
        return self.encoder.encode(text, {"prompt": prompt}, "the answer").token_ids

    def logps(self, prompt: Prompt, ids: list[int]) -> list[float]:
        return completion_logps(self._model, prompt_ids_of(self.reader, prompt), ids)

    @cached_property
    def _model(self) -> Any:
        return load_model(self.name, self.dtype, self.device, STUDENT_FLAG)

    def teachers_logps(self, answer: TeacherAnswer, ids: list[int]) -> tuple[list[float] | None, str]:
        """The teacher's log-probs of the student's tokens, where both have the same; else why they have not."""
        if answer.logps is None:
            return None, "the teacher gave none"
        if any(not logp <= 0 or logp == float("-inf") for logp in answer.logps):
            return None, "not all of them are finite and at most 0"
        if answer.token_ids is not None:
            return (answer.logps, "") if answer.token_ids == ids else (None, "the teacher wrote other tokens")
        return self._server_logps(answer, ids)

    def _server_logps(self, answer: TeacherAnswer, ids: list[int]) -> tuple[list[float] | None, str]:
        tokens = answer.tokens or []
        if len(tokens) == len(ids) - 1 and self._spelled(tokens, ids[:-1]):
            return None, "the server gave none of the token that ends the answer"
        if len(tokens) != len(ids) or not self._spelled(tokens, ids):
            return None, "the server wrote other tokens"
        return answer.logps, ""

    def _spelled(self, tokens: list[str], ids: list[int]) -> bool:
        """Whether the server's tokens are spelled as the student's.

        Where tokens are parts of characters, servers spell each as what its bytes alone make, or all of a character
        with its last token.
        """
        own = self.reader.tokenizer.batch_decode([[token] for token in ids])
        alike = [self._is_alike(*token) for token in zip(tokens, own, ids, strict=True)]
        start = 0
        for is_part, run in groupby(own, key=lambda text: PART_OF_A_CHARACTER in text):
            part = slice(start, start := start + len(list(run)))
            together = is_part and "".join(tokens[part]) == self.reader.tokenizer.decode(ids[part])
            if not together and not all(alike[part]):
                return False
        return True

    def _is_alike(self, theirs: str, ours: str, token: int) -> bool:
        """Some tokenizers take a blank off a lone token, and some servers show nothing of the one that ends it all."""
        return theirs in (ours, f" {ours}") or (theirs == "" and token in self.encoder.eos_token_ids)
