"""Failures on demand: a rule says which calls of which endpoint fail, and how; a log says what fired."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from fnmatch import fnmatch
from threading import Lock

FOREVER = 1 << 30
# What the Hub answers, with a 400, when the exchange of an id token takes it more than ten seconds
# (huggingface/hub-docs#2757).
ABORTED: Mapping[str, object] = {"error": "invalid_grant", "error_description": "This operation was aborted"}


class Kind(StrEnum):
    """What happens to a call.

    Attributes:
        STATUS: answered with `status`; nothing is done.
        APPLIED_STATUS: carried out, then answered with `status`.
        APPLIED_RESET: carried out, then the connection is reset: the answer is lost.
        RESET_BEFORE: the connection is reset when the head of the request is here.
        RESET_IN: the connection is reset when `after_bytes` of the request's body are here.
        RESET_AFTER: the connection is reset when the whole request is here; nothing is done.
        RESET_ANSWER: carried out, then the connection is reset after half of the answer's body.
        SLOW: carried out after `delay_s`, and answered.
        SILENT: never answered; nothing is done.
        STALE: answered from the repository as it was before its last change.
        DAMAGED: what is stored is not what was sent. For a commit: other content, with the digest of that content,
            under the path `file`. For uploaded bytes: the last bit flipped, under the digest that was announced.
        EXPIRED: the token, or the signed URL, of this call has expired, for this call and for all later ones.
        DROPPED: the commit leaves out `file`, and says nothing of it.
        IGNORED: the answer to announced files says that `file` is to be left out, whatever the client sends.
        QUOTA: refused as if the storage of the namespace were full; a batch call refuses each object.
    """

    STATUS = "status"
    APPLIED_STATUS = "applied-status"
    APPLIED_RESET = "applied-reset"
    RESET_BEFORE = "reset-before"
    RESET_IN = "reset-in"
    RESET_AFTER = "reset-after"
    RESET_ANSWER = "reset-answer"
    SLOW = "slow"
    SILENT = "silent"
    STALE = "stale"
    DAMAGED = "damaged"
    EXPIRED = "expired"
    IGNORED = "ignored"
    DROPPED = "dropped"
    QUOTA = "quota"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """Calls `nth` to `nth + times - 1` of an endpoint fail; calls are counted from 1, from when the rule is added.

    Where several rules hit one call, the oldest is carried out; the others count the call all the same.

    Attributes:
        endpoint: name of an endpoint (the first column in `tests.hub.routes`), or a pattern of names such as `lfs-*`.
        kind: what happens.
        nth: the first call that fails.
        times: how many calls fail; `FOREVER` for all later ones.
        where: regular expression, searched in the raw path; calls that it does not fit are not counted.
        status: of the answer, for STATUS and APPLIED_STATUS.
        body: keys of that answer's JSON, in place of the Hub's usual `error`.
        headers: more headers of that answer. Without any, a 429 says how long to wait (one second), as the Hub does.
        delay_s: for SLOW: seconds before anything is done.
        after_bytes: for RESET_IN.
        file: for DAMAGED, DROPPED and IGNORED: the path in the repository.
        orderly: the connection is closed (FIN) where a reset (RST) would be.
    """

    endpoint: str
    kind: Kind
    nth: int = 1
    times: int = 1
    where: str = ""
    status: int = 503
    body: Mapping[str, object] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    delay_s: float = 0.0
    after_bytes: int = 0
    file: str = ""
    orderly: bool = False

    def fits(self, endpoint: str, path: str) -> bool:
        """Return whether the rule is about this call."""
        return fnmatch(endpoint, self.endpoint) and re.search(self.where, path) is not None

    @property
    def ends_connection(self) -> bool:
        """Whether the client gets no whole answer."""
        return "reset" in self.kind or self.kind is Kind.SILENT


@dataclass(frozen=True, slots=True, kw_only=True)
class Fired:
    """One call that a rule hit.

    Attributes:
        rule: the rule.
        endpoint: name of the endpoint.
        method: upper case.
        path: raw, without the query.
        call: which of the calls that the rule fits.
    """

    rule: Rule
    endpoint: str
    method: str
    path: str
    call: int


@dataclass(slots=True)
class Faults:
    """The rules of one Hub, the oldest first, and what they did."""

    _rules: list[Rule] = field(default_factory=list)
    _calls: list[int] = field(default_factory=list)
    _fired: list[Fired] = field(default_factory=list)
    _lock: Lock = field(default_factory=Lock)

    def add(self, rule: Rule) -> None:
        """Add a rule."""
        with self._lock:
            self._rules.append(rule)
            self._calls.append(0)

    def clear(self) -> None:
        """Forget all rules; the log stays."""
        with self._lock:
            self._rules.clear()
            self._calls.clear()

    def take(self, endpoint: str, method: str, path: str) -> Rule | None:
        """Count a call, and return the rule that hits it."""
        hit: Rule | None = None
        with self._lock:
            for index, rule in enumerate(self._rules):
                if not rule.fits(endpoint, path):
                    continue
                self._calls[index] += 1
                call = self._calls[index]
                if hit is None and rule.nth <= call < rule.nth + rule.times:
                    hit = rule
                    self._fired.append(Fired(rule=rule, endpoint=endpoint, method=method, path=path, call=call))
        return hit

    def fired(self) -> list[Fired]:
        """Return what the rules did so far, in the order of the calls."""
        with self._lock:
            return list(self._fired)
