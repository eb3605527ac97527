"""What goes wrong with the Hub: one sentence for the person, and whether to try again."""

import time
from collections.abc import Callable
from typing import TypeVar
from urllib.parse import urlsplit

from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

from ..runs.hub_client import TransportError
from ..runs.redaction import known_secrets, redact


FIRST_WAIT = 2.0  # seconds, doubled after each failure
LONGEST_WAIT = 60.0

Result = TypeVar("Result")


class PushError(Exception):
    """Why something was not pushed, in one sentence for the person, without secrets.

    Attributes:
        passes: whether the same call may work later.
        retry_after: seconds that the Hub asked to wait, if it did.
    """

    def __init__(self, message: str, passes: bool = False, retry_after: float | None = None):
        super().__init__(message)
        self.passes, self.retry_after = passes, retry_after


class SourceGoneError(PushError):
    """What was to be pushed is no longer on disk."""


def with_retries(
    action: Callable[[], Result], seconds: float, say: Callable[[str], None], sleep: Callable[[float], bool | None]
) -> Result:
    """The action's result. Repeats it, with growing waits, as long as its failures may pass and the time allows.

    Args:
        seconds: after which no new attempt is made; 0 for a single one.
        say: is told of each failure that is followed by another attempt.
        sleep: waits so many seconds; True ends it all, with the failure.

    Raises:
        PushError: the last failure.
    """
    deadline, wait = time.monotonic() + seconds, FIRST_WAIT
    while True:
        try:
            return action()
        except Exception as error:  # whatever it is, it becomes a sentence for the person
            problem = explain(error)
            pause = wait if problem.retry_after is None else max(wait, problem.retry_after)
            if not problem.passes or time.monotonic() + pause > deadline:
                raise problem from error
        say(f"{problem}. Trying again in {pause:.0f} s.")
        if sleep(pause):
            raise problem
        wait = min(2 * wait, LONGEST_WAIT)


def explain(error: BaseException) -> PushError:
    """What the Hub's client raised, as one sentence without secrets."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, PushError):
            return cause
        if isinstance(cause, HfHubHTTPError) and cause.response is not None:
            return _explain_status(cause)
        if isinstance(cause, OfflineModeIsEnabled):
            return PushError("HF_HUB_OFFLINE is set, so that nothing is sent to the Hub")
        if isinstance(cause, LocalTokenNotFoundError):
            return PushError("there is no token here. Log in with `hf auth login`, or set HF_TOKEN")
        if isinstance(cause, TransportError):
            return PushError(f"no connection to the Hub ({type(cause).__name__}: {_one_line(cause)})", passes=True)
        cause = cause.__cause__
    # hf_xet reports what its transfers met as RuntimeError or ConnectionError
    passes = isinstance(error, RuntimeError | ConnectionError | TimeoutError)
    return PushError(": ".join(filter(None, [type(error).__name__, _one_line(error)])), passes)


def _explain_status(error: HfHubHTTPError) -> PushError:
    status, path = error.response.status_code, urlsplit(str(error.response.url)).path
    if status in (401, 403):
        return PushError(
            f"the Hub refused the token ({status}). Log in with `hf auth login`, or set HF_TOKEN to a token that may "
            "write there"
        )
    retry_after = error.response.headers.get("Retry-After", "")
    return PushError(
        f"the Hub answered {status} to {path}: {_one_line(error.server_message or error)}",
        passes=status in (408, 409, 412, 429) or status >= 500,
        retry_after=float(retry_after) if retry_after.isdecimal() else None,
    )


def _one_line(error: object) -> str:
    return redact(str(error).strip().split("\n", 1)[0].rstrip("."), known_secrets())
