"""How a call reaches the Hub: with timeouts, repeated within a deadline, and its errors in our own words.

Covered: what the client does not retry itself (429, 5xx, timeouts, broken connections), `Retry-After` and
`RateLimit` headers, and writes whose answer was lost (`Caller.settle` reads the remote before it writes again).
Not covered: a server that sends one byte now and then; each read has a timeout, the whole answer has none.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

from runner.protocol.errors import AccessDenied, HubUnavailable, InputError, Problem, PublishConflict, RunnerError
from runner.supervisor.hub.login import Login
from runner.supervisor.hub.translate import client_errors, pause_hint_s, translate

T = TypeVar("T")
A = TypeVar("A")

CONNECT_TIMEOUT_S = 20.0
DEFAULT_TIMEOUT_S = 60.0
TIMEOUT_VARIABLE = "LORA_MERGE_HUB_TIMEOUT_S"
DEADLINE_VARIABLE = "LORA_MERGE_HUB_DEADLINE_S"
FIRST_WAIT_VARIABLE = "LORA_MERGE_HUB_FIRST_WAIT_S"
LEAST_NAMED_WAIT_S = 300.0  # a whole window of the Hub's rate limit
TOLD_FROM_S = 5.0  # a wait as long as this is told
TOLD_EVERY_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long a failing call is repeated.

    Two clocks run: one for the waits of our own choice, one for those that the Hub names, such as the rest of a
    five-minute window of its rate limit.

    Attributes:
        attempts: at most so many requests for one call; by default so many that a deadline ends the waiting first.
        deadline_s: no new request is started when it would begin later than this after the first one, named waits
            left out.
        first_wait_s: before the second request; doubled each time.
        longest_wait_s: the doubling ends here.
        named_wait_s: as long, all together, the waits that the Hub names may be.
    """

    attempts: int = 100
    deadline_s: float = 180.0
    first_wait_s: float = 1.0
    longest_wait_s: float = 20.0
    named_wait_s: float = LEAST_NAMED_WAIT_S


def read_patience(environ: Mapping[str, str]) -> tuple[float, Patience]:
    """Return the longest silence of the Hub in seconds, and the patience, as the environment sets them.

    Args:
        environ: may hold `LORA_MERGE_HUB_TIMEOUT_S`, `LORA_MERGE_HUB_DEADLINE_S` and `LORA_MERGE_HUB_FIRST_WAIT_S`.

    Raises:
        InputError: a value is not a number of seconds above 0; all of them at once.
    """
    default = Patience()
    problems: list[Problem] = []

    def seconds(name: str, default_s: float) -> float:
        text = environ.get(name, "").strip()
        try:
            value_s = float(text) if text else default_s
        except ValueError:
            value_s = math.nan
        if not 0 < value_s < math.inf:
            problems.append(
                Problem(
                    what=f"The variable `{name}` is {text!r}.",
                    why="It is a time in seconds, above 0.",
                    fix=f"Write a number such as `{default_s:g}`, which is the default, or leave it out.",
                )
            )
        return value_s

    timeout_s = seconds(TIMEOUT_VARIABLE, DEFAULT_TIMEOUT_S)
    deadline_s = seconds(DEADLINE_VARIABLE, default.deadline_s)
    first_wait_s = seconds(FIRST_WAIT_VARIABLE, default.first_wait_s)
    if problems:
        raise InputError(problems)
    return timeout_s, Patience(deadline_s=deadline_s, first_wait_s=first_wait_s)


@lru_cache(maxsize=1)
def install_client(timeout_s: float) -> None:
    """Make every later request of huggingface_hub use a client with timeouts, and keep the library quiet.

    The default client waits for ever. Progress bars and warnings are off because both print URLs, and the URLs of
    uploads are signed. Calling it again with the same value changes nothing, so that open connections are kept.
    """
    import httpx2
    from huggingface_hub import constants, logging, set_client_factory
    from huggingface_hub.utils import disable_progress_bars
    from huggingface_hub.utils._http import default_client_factory

    timeout = httpx2.Timeout(timeout_s, connect=min(timeout_s, CONNECT_TIMEOUT_S))

    def bound(request: httpx2.Request) -> None:
        """Give a request that would wait for ever (listings do) the timeouts of all others."""
        asked = request.extensions.get("timeout", {})
        request.extensions["timeout"] = {
            name: limit if asked.get(name) is None else asked[name] for name, limit in timeout.as_dict().items()
        }

    def factory() -> httpx2.Client:
        client: httpx2.Client = default_client_factory()
        client.timeout = timeout
        hooks = client.event_hooks
        client.event_hooks = {**hooks, "request": [*hooks["request"], bound]}
        return client

    set_client_factory(factory)
    disable_progress_bars()
    logging.set_verbosity_error()
    constants.HF_HUB_DISABLE_TELEMETRY = True


class Caller:
    """Makes calls of the client on behalf of one login."""

    def __init__(self, *, login: Login, patience: Patience, say: Callable[[str], None] = lambda _line: None) -> None:
        """Take whose secrets no error may show, how long to try, and who is told of long waits."""
        self._login = login
        self._patience = patience
        self._say = say

    def read(self, doing: str, call: Callable[[], T], *, attempts: int | None = None) -> T:
        """Return what `call` returns; it may be made several times.

        Args:
            doing: what is being done, for the error's text, such as "read the refs of owner/name".
            call: one call of the client, without side effects or idempotent.
            attempts: fewer than the patience has, for endpoints that must not be pressed.

        Raises:
            HubError: the family says why; `HubUnavailable` after the last attempt.
        """
        for wait in self._waits(doing, attempts or self._patience.attempts):
            try:
                return call()
            except client_errors() as error:
                failure = self._translate(error, doing)
                hint_s = pause_hint_s(error)
            if isinstance(failure, AccessDenied) and self._login.renew():
                hint_s = 0.0  # with another token, at once
            elif not isinstance(failure, HubUnavailable):
                raise failure from None  # the client's own text may hold a signed URL
            if not wait(hint_s, failure):
                raise failure from None
        raise AssertionError("the last wait is always refused")

    def settle(self, doing: str, write: Callable[[], A], landed: Callable[[A | None], T | None]) -> T:
        """Write once, and return what `landed` then reads from the Hub.

        Args:
            doing: what is being done, for the error's text.
            write: one write of the client. It is repeated only after `landed` has shown that it had no effect.
            landed: gets the answer of the write, or None when the answer is unknown. Returns the effect as read
                from the Hub, None when there is none yet, or raises when the Hub shows somebody else's.

        Raises:
            HubError: the write was refused, or the Hub stayed unreachable.
            PublishConflict: the Hub answered that the target had moved.
        """
        answer: A | None = None
        failure: RunnerError | None = None
        for wait in self._waits(doing, self._patience.attempts):
            hint_s: float | None = None
            if answer is None:
                try:
                    answer, failure = write(), None
                except client_errors() as error:
                    failure = self._translate(error, doing)
                    hint_s = pause_hint_s(error)
            if isinstance(failure, AccessDenied) and self._login.renew():
                hint_s = 0.0  # with another token, at once; the write was refused, so it had no effect
            elif failure is not None and not isinstance(failure, (HubUnavailable, PublishConflict)):
                raise failure
            found = landed(answer)
            if found is not None:
                return found
            if not wait(hint_s, failure):
                raise failure or _not_shown(doing)
        raise AssertionError("the last wait is always refused")

    def _translate(self, error: BaseException, doing: str) -> RunnerError:
        return translate(error, doing=doing, secrets=self._login.secrets)

    def _waits(self, doing: str, attempts: int) -> Iterator[Callable[[float | None, RunnerError | None], bool]]:
        patience = self._patience
        begin_s = time.monotonic()
        named_s = 0.0
        for attempt in range(attempts):
            own_s = min(patience.longest_wait_s, patience.first_wait_s * 2 ** min(attempt, 30))

            def wait(
                hint_s: float | None, failure: RunnerError | None, attempt: int = attempt, own_s: float = own_s
            ) -> bool:
                nonlocal named_s
                if attempt + 1 == attempts:
                    return False
                if hint_s is None:
                    if time.monotonic() + own_s - begin_s - named_s > patience.deadline_s:
                        return False
                    time.sleep(own_s)
                    return True
                pause_s = max(hint_s, patience.first_wait_s)
                if named_s + pause_s > patience.named_wait_s:
                    raise _too_long(doing, failure, pause_s, named_s, patience.named_wait_s)
                named_s += pause_s
                self._wait_as_asked(doing, pause_s)
                return True

            yield wait

    def _wait_as_asked(self, doing: str, pause_s: float) -> None:
        left_s = pause_s
        while left_s > 0:
            if pause_s >= TOLD_FROM_S:
                self._say(f"The Hub asks to wait before it is asked again to {doing}: {left_s:.0f} s left.")
            step_s = min(left_s, TOLD_EVERY_S)
            time.sleep(step_s)
            left_s -= step_s


def _too_long(
    doing: str, failure: RunnerError | None, pause_s: float, waited_s: float, limit_s: float
) -> HubUnavailable:
    before = f" after {waited_s:.0f} s that it named before" if waited_s else ""
    return HubUnavailable(
        f"Could not {doing}: the Hub asks to wait {pause_s:.0f} s{before}, and this run waits {limit_s:.0f} s at most.",
        why=failure.problem.what if failure is not None else "It named that time in its answer.",
        fix="Run again when that time is over, or let `phase-timeout-minutes` be longer than the wait.",
    )


def _not_shown(doing: str) -> HubUnavailable:
    return HubUnavailable(
        f"Could not {doing}: the Hub accepted it, but does not show it.",
        why="What it reads back is older than what it accepted.",
        fix="Wait a minute and run again; a run that finds the work done adopts it.",
    )
