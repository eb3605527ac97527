"""Making the samples that are missing, chunk by chunk, each kept as soon as it is made."""

from collections.abc import Sequence

from tqdm import tqdm

from . import EvaluationError
from .backends import ReportsLengths, Request
from .lines import Sample, prompt_hash
from .samples import SampleStore


class Sampler:
    """
    Args:
        backend: the loaded model; None where every sample is kept already.
        store: where samples are kept.
        seed: of the sampling.
        chunk_size: samples generated at a time: so many are lost to a kill at most.
    """

    def __init__(self, backend: ReportsLengths | None, store: SampleStore, seed: int, chunk_size: int):
        self.backend, self.store, self.seed, self.chunk_size = backend, store, seed, chunk_size

    def make(self, requests: Sequence[Request]) -> None:
        """Make and keep what is missing, beside other processes that do so. Returns in the last one, which scores.

        Raises:
            LeftToOthersError: if other processes are still at work.
        """
        if self.backend is None:
            self.store.be_last()
            return
        _check_lengths(self.backend, requests)
        # Whole chunks, whatever is missing: the same ones in every process, and after a restart
        chunks = [requests[start : start + self.chunk_size] for start in range(0, len(requests), self.chunk_size)]
        with tqdm(total=len(requests), initial=self._kept(requests), desc="Samples", unit="") as bar:
            self._make_all(self.backend, chunks, bar)
            self.store.be_last()
            self._make_all(self.backend, chunks, bar)  # what a process had claimed that was killed just now

    def _make_all(self, backend: ReportsLengths, chunks: Sequence[Sequence[Request]], bar: tqdm) -> None:
        """All that other processes are not at: again and again, since one of them may end without a result."""
        while self._make_missing(backend, chunks, bar):
            pass

    def _make_missing(self, backend: ReportsLengths, chunks: Sequence[Sequence[Request]], bar: tqdm) -> int:
        """One way through the chunks that no other process is at. Returns how many samples were made."""
        made = 0
        for chunk in chunks:
            missing = [request for request in chunk if not self._is_kept(request)]
            if not missing:
                continue
            with self.store.claimed([request.key for request in missing]) as mine:
                missing = [request for request in missing if request.key in mine]
                if missing:
                    self.store.append(self._sampled(backend, missing))
                made += len(missing)
            bar.update(self._kept([request for of_chunk in chunks for request in of_chunk]) - bar.n)
        return made

    def _kept(self, requests: Sequence[Request]) -> int:
        return sum(request.key in self.store.samples for request in requests)

    def _sampled(self, backend: ReportsLengths, requests: Sequence[Request]) -> list[Sample]:
        responses = backend.sample(requests, self.seed)
        return [
            Sample(*request.key, prompt_hash(request.prompt), made.text, made.tokens, made.truncated)
            for request, made in zip(requests, responses, strict=True)
        ]

    def _is_kept(self, request: Request) -> bool:
        kept = self.store.samples.get(request.key)
        if kept is not None and kept.prompt_hash != prompt_hash(request.prompt):
            raise EvaluationError(
                f"--output_dir {self.store.directory}: the sample of {request.task}, problem {request.doc_id}, was "
                "made from another prompt than now, so the chat template or a library has changed. Choose another "
                "--output_dir."
            )
        return kept is not None


def _check_lengths(backend: ReportsLengths, requests: Sequence[Request]) -> None:
    """lm-eval would cut what does not fit, at the beginning of the prompt or at the end of the response.

    Raises:
        EvaluationError: if the longest prompt and response are more than the model's window.
    """
    one_of_each = {(request.task, request.doc_id): request for request in requests}
    lengths = [(backend.prompt_length(request), request) for request in one_of_each.values()]
    longest, where = max(lengths, key=lambda value: value[0])
    max_new_tokens = where.generation["max_gen_toks"]
    window = backend.max_length
    if longest + max_new_tokens > window:
        raise EvaluationError(
            f"--max_new_tokens {max_new_tokens} does not fit: the longest prompt ({where.task}, problem "
            f"{where.doc_id}) has {longest} tokens, and the model's window {window}. At most "
            f"{max(window - longest, 0)} fit; luffy-trl prepare-model extends the window as the paper did."
        )
