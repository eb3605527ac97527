"""Which problems are the same: duplicates, and training problems that are also in a benchmark.

Two problems are *the same* if they differ in nothing but case, white space, LaTeX layout commands and closing
punctuation. A problem *overlaps* with a benchmark if they share 13 consecutive words, the length with which GPT-3's
training data was compared with its benchmarks (arXiv 2005.14165, appendix C).
"""

import re
import unicodedata
from collections.abc import Iterator
from hashlib import blake2b


NGRAM_SIZE = 13

# Changes how a formula looks, not what it says. `\left` must not be found in `\leftarrow`.
_LAYOUT = re.compile(r"\\(?:left|right|displaystyle|textstyle|limits|quad|qquad)(?![a-z])|\\[,;:! ()\[\]]|[$~]")
_FRACTIONS = re.compile(r"\\[dt]frac(?![a-z])")
_TOKEN = re.compile(r"\\?[^\W_]+|[^\w\s]|_")
_WORD = re.compile(r"[^\W_]+")


def normalize_problem(text: str) -> str:
    """The problem without what makes no difference. Signs and operators stay: x + 1 = 2 is not x - 1 = 2."""
    return " ".join(_TOKEN.findall(_without_layout(text))).rstrip(" .,;:!?")


def problem_key(text: str) -> bytes:
    """16 bytes that are the same for problems that are the same, in any process."""
    return blake2b(normalize_problem(text).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def word_ngrams(text: str, size: int) -> Iterator[str]:
    """Every run of `size` words: letters and digits, in lower case, with nothing of what stands between them."""
    words = _WORD.findall(_without_layout(text))
    for i in range(len(words) - size + 1):
        yield " ".join(words[i : i + size])


def _without_layout(text: str) -> str:
    text = unicodedata.normalize("NFKC", text).lower()
    return _LAYOUT.sub(" ", _FRACTIONS.sub(r"\\frac", text))


class BenchmarkIndex:
    """The problems of benchmarks, to find training problems among them.

    A problem of fewer words than `ngram_size` can only be found as a whole.

    Args:
        ngram_size: in words; 0 compares whole problems only.
    """

    def __init__(self, ngram_size: int = NGRAM_SIZE):
        self.ngram_size = ngram_size
        self.problems: dict[str, str] = {}  # normalised problem -> its benchmark
        self.ngrams: dict[str, str] = {}

    def add(self, benchmark: str, problem: str) -> None:
        self.problems.setdefault(normalize_problem(problem), benchmark)
        for ngram in self._ngrams(problem):
            self.ngrams.setdefault(ngram, benchmark)

    def find(self, problem: str) -> str | None:
        """Where the problem is found, and how; None if it is not."""
        benchmark = self.problems.get(normalize_problem(problem))
        if benchmark is not None:
            return f"the same problem is in {benchmark}"
        shared = next((ngram for ngram in self._ngrams(problem) if ngram in self.ngrams), None)
        return None if shared is None else f"shares with {self.ngrams[shared]}: {shared}"

    def _ngrams(self, problem: str) -> Iterator[str]:
        return word_ngrams(problem, self.ngram_size) if self.ngram_size else iter(())
