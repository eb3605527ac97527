"""The filters that need worker processes or the other rows, and the count of everything that was dropped.

Duplicates come last, so that the first *usable* copy of a problem is the one that stays.
"""

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, TextIO

from ..rewards.completions import Thought, answer_part
from ..rewards.verification import judge_math
from .contract import contract_row
from .schemas import (
    BAD_DEMONSTRATION,
    BAD_PROMPT,
    NO_DEMONSTRATION,
    NO_GOLD,
    UNFINISHED,
    Candidate,
    Example,
)
from .screening import CONTAMINATED, TOO_LONG


UNVERIFIED = "not verified"
GOLD_UNREADABLE = "gold answer unreadable"
DUPLICATE = "duplicate"
SURPLUS = "more than asked for"  # of demonstrations only
# In the order in which they are looked for: a row without a demonstration left is counted under the last of theirs
REASONS = (
    BAD_PROMPT,
    NO_GOLD,
    NO_DEMONSTRATION,
    BAD_DEMONSTRATION,
    UNFINISHED,
    CONTAMINATED,
    TOO_LONG,
    GOLD_UNREADABLE,
    UNVERIFIED,
    DUPLICATE,
    SURPLUS,
)


MALFORMED = (BAD_PROMPT, NO_GOLD, BAD_DEMONSTRATION)


@dataclass
class Tally:
    """How many rows and demonstrations were read, kept, and dropped for which reason."""

    read: Counter = field(default_factory=Counter)
    kept: Counter = field(default_factory=Counter)
    rows: Counter = field(default_factory=Counter)
    demonstrations: Counter = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)  # reason -> the first row dropped for it, and what was found

    def add(self, row: dict[str, Any]) -> None:
        candidates, reason = row["candidates"], row["reason"]
        if reason is not None:
            self.first.setdefault(reason, f"row {row['row']}" + (f": {row['detail']}" if row["detail"] else ""))
        self.read.update(rows=1, demonstrations=len(candidates))
        self.demonstrations.update(c["lost"] or reason for c in candidates if c["lost"] or reason)
        if reason is None:
            left = sum(c["lost"] is None for c in candidates)
            self.kept.update(rows=1, demonstrations=left, bare=left == 0)
        else:
            self.rows[reason] += 1

    def table(self, not_checked: dict[str, str]) -> list[list[str]]:
        """Rows of a table: what, how many rows, how many demonstrations. `not_checked`: reason -> why it is off."""
        lines = [["read", f"{self.read['rows']:,}", f"{self.read['demonstrations']:,}"]]
        for reason in REASONS:
            if reason in not_checked:
                lines.append([f"{reason}: not checked, {not_checked[reason]}", "-", "-"])
            elif reason == SURPLUS:
                if self.demonstrations[reason]:
                    lines.append([reason, "-", f"{self.demonstrations[reason]:,}"])
            else:
                lines.append([reason, f"{self.rows[reason]:,}", f"{self.demonstrations[reason]:,}"])
        lines.append(["kept", f"{self.kept['rows']:,}", f"{self.kept['demonstrations']:,}"])
        if self.kept["bare"]:
            lines.append(["kept without a demonstration", f"{self.kept['bare']:,}", "-"])
        return lines

    def malformed(self) -> list[str]:
        """A sentence on the first row of each kind that should not be there at all."""
        return [f"{reason}, the first in {self.first[reason]}." for reason in MALFORMED if reason in self.first]


@dataclass
class Finisher:
    """Verifies, deduplicates and counts batches of screened rows, and makes rows of the contract of those kept.

    Args:
        verify: "answers" judges each demonstration against the gold answer, "source" takes the source's own verdict,
            None leaves it out.
        thought: which part of a demonstration is judged, see `answer_part`.
        max_demonstrations: of each prompt; the first ones are kept. None: all.
        several: whether rows have `demonstrations` or one `completion`.
        dropped: where each dropped row is noted, one JSON object a line.
        keep_bare: keep rows without a demonstration, or with none left: `rest` has them, after all others.
    """

    verify: str | None
    thought: Thought
    deduplicate: bool
    max_demonstrations: int | None
    conversational: bool
    several: bool
    dropped: TextIO
    keep_bare: bool = False
    tally: Tally = field(default_factory=Tally)
    seen: dict[bytes, int] = field(default_factory=dict)  # problem -> the row that stays
    bare: list[dict[str, Any]] = field(default_factory=list)  # rows without a demonstration, to be settled last

    def __call__(self, batch: dict[str, list]) -> list[dict[str, Any]]:
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        # Their texts are judged together: the worker processes have something to do
        self._verify([row for row in rows if row["reason"] is None])
        if self.keep_bare:
            # Of two copies of a problem the one with a demonstration is to stay
            self.bare += [row for row in rows if row["reason"] is None and not _left(row)]
            rows = [row for row in rows if row["reason"] is not None or _left(row)]
        return self._settled(rows)

    def rest(self) -> list[dict[str, Any]]:
        """The rows without a demonstration, once all others are settled."""
        return self._settled(self.bare)

    def _settled(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for row in rows:
            self._settle(row)
        return [self._kept(row) for row in rows if row["reason"] is None]

    def _verify(self, rows: list[dict[str, Any]]) -> None:
        pairs = [(c, row["solution"]) for row in rows for c in row["candidates"] if c["lost"] is None]
        if self.verify == "source":
            for candidate, _ in pairs:
                if not candidate["verified"]:
                    _lose(candidate, UNVERIFIED, "the source does not call it right")
        elif self.verify == "answers":
            for candidate, _ in pairs:
                candidate["answer"] = answer_part(candidate["text"], mode=self.thought)
                if candidate["answer"] is None:
                    _lose(candidate, UNVERIFIED, "it has no </think>, after which the answer is looked for")
            pairs = [(candidate, gold) for candidate, gold in pairs if candidate["lost"] is None]
            verdicts = judge_math([candidate["answer"] for candidate, _ in pairs], [gold for _, gold in pairs])
            for (candidate, gold), verdict in zip(pairs, verdicts, strict=True):
                if verdict.equal is None:
                    _lose(candidate, GOLD_UNREADABLE, f"Math-Verify finds no answer in {gold[:200]!r}")
                elif not verdict.equal:
                    _lose(candidate, UNVERIFIED, f"{verdict.outcome}: {verdict.answer!r}, gold {gold[:200]!r}")
            if self.keep_bare:
                self._verify_golds([row for row in rows if not _left(row)])

    def _verify_golds(self, rows: list[dict[str, Any]]) -> None:
        """What no response can be compared with is nothing to train on, with a demonstration or without."""
        verdicts = judge_math([""] * len(rows), [row["solution"] for row in rows])
        for row, verdict in zip(rows, verdicts, strict=True):
            if verdict.equal is None:
                row["reason"] = GOLD_UNREADABLE
                row["detail"] = f"Math-Verify finds no answer in {row['solution'][:200]!r}"

    def _settle(self, row: dict[str, Any]) -> None:
        if row["reason"] is None:
            row["reason"], row["detail"] = self._reason(row)
        if row["reason"] is None:
            for candidate in _left(row)[self.max_demonstrations :] if self.max_demonstrations else []:
                _lose(candidate, SURPLUS, None)
        else:
            note = {name: row[name] for name in ("row", "id", "reason", "detail")}
            self.dropped.write(json.dumps(note, ensure_ascii=False) + "\n")
        self.tally.add(row)

    def _reason(self, row: dict[str, Any]) -> tuple[str | None, str | None]:
        """Why a row that passed screening is dropped, if it is."""
        if not row["candidates"] and not self.keep_bare:
            return NO_DEMONSTRATION, None
        if not _left(row) and not self.keep_bare:
            last = max(row["candidates"], key=lambda candidate: REASONS.index(candidate["lost"]))
            return last["lost"], last["detail"]
        if self.deduplicate:
            first = self.seen.setdefault(row["key"], row["row"])
            if first != row["row"]:
                return DUPLICATE, f"the same problem as row {first}"
        return None, None

    def _kept(self, row: dict[str, Any]) -> dict[str, Any]:
        candidates = [Candidate(c["text"]) for c in _left(row)]
        example = Example(row["prompt"], row["solution"], candidates, row["source"], row["id"])
        return contract_row(example, self.conversational, self.several)


def _left(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The demonstrations that are not lost."""
    return [candidate for candidate in row["candidates"] if candidate["lost"] is None]


def _lose(candidate: dict[str, Any], reason: str, detail: str | None) -> None:
    candidate["lost"], candidate["detail"] = reason, detail
