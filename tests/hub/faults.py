"""Failures on demand: the n-th request that fits a rule is refused, delayed, or answered into the void."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from threading import Lock


@dataclass(slots=True, kw_only=True)
class Fault:
    """One rule.

    Attributes:
        method: HTTP method, or `*`.
        path: regular expression, searched in the raw path (without query).
        times: how many matching requests it hits; the rest pass.
        skip: how many matching requests pass first.
        status: what the client gets.
        after_apply: carry the request out before failing it (a lost response).
        drop: break the connection in place of the answer.
        delay_s: seconds to wait before anything else; with `status` 0 the request is then served.
        headers: more response headers, for example Retry-After.
    """

    method: str
    path: str
    times: int = 1
    skip: int = 0
    status: int = 503
    after_apply: bool = False
    drop: bool = False
    delay_s: float = 0.0
    headers: Mapping[str, str] = field(default_factory=dict)

    def fits(self, method: str, path: str) -> bool:
        """Return whether the rule is about this request."""
        return self.method in ("*", method) and re.search(self.path, path) is not None


@dataclass(slots=True)
class Faults:
    """All rules of one Hub, the oldest first; and the paths whose next commit is stored damaged."""

    _rules: list[Fault] = field(default_factory=list)
    _damaged: list[str] = field(default_factory=list)
    _lock: Lock = field(default_factory=Lock)

    def add(self, fault: Fault) -> None:
        """Add a rule."""
        with self._lock:
            self._rules.append(fault)

    def clear(self) -> None:
        """Forget all rules."""
        with self._lock:
            self._rules.clear()
            self._damaged.clear()

    def take(self, method: str, path: str) -> Fault | None:
        """Return the rule that hits this request, and count it."""
        with self._lock:
            for rule in self._rules:
                if rule.times > 0 and rule.fits(method, path):
                    if rule.skip > 0:
                        rule.skip -= 1
                        continue
                    rule.times -= 1
                    return rule
        return None

    def damage(self, path: str) -> None:
        """Make the next commit of file `path` store other bytes than were sent."""
        with self._lock:
            self._damaged.append(path)

    def take_damage(self, path: str) -> bool:
        """Return whether this file is to be damaged, and forget it."""
        with self._lock:
            if path not in self._damaged:
                return False
            self._damaged.remove(path)
            return True
