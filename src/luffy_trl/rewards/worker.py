"""The worker that judges mathematics: `python -m luffy_trl.rewards.worker`."""

from functools import lru_cache
from typing import Any

from .answers import find_answer, read_gold
from .comparison import equal, parsed
from .serving import serve


MAX_SHOWN = 200  # characters of a parsed answer that are sent back


@lru_cache(maxsize=4096)  # the completions of a group share their gold
def parse_gold(gold: str) -> str | None:
    """The gold answer in tidy LaTeX, None if no answer could equal it."""
    latex = read_gold(gold)
    return latex if latex and parsed(latex) else None


def judge(answer: str, gold: str) -> dict:
    gold_latex = parse_gold(gold)
    if gold_latex is None:
        return {"equal": None, "outcome": "gold not parsed"}
    parts = find_answer(answer)
    if not any(map(parsed, parts)):
        return {"equal": False, "outcome": "no answer"}
    # Several boxes are one answer, unless they say the same: "\\boxed{\\frac12} or \\boxed{0.5}"
    right = equal(gold_latex, ", ".join(parts)) or (len(parts) > 1 and all(equal(gold_latex, part) for part in parts))
    shown = ",".join(str(parsed(part)[-1]) for part in parts if parsed(part))
    return {"equal": right, "outcome": "equal" if right else "different", "answer": shown[:MAX_SHOWN]}


def answer(request: dict[str, Any]) -> dict[str, Any]:
    return judge(request["answer"], request["gold"])


if __name__ == "__main__":
    serve(answer)
