"""Rate limits: requests are counted in windows of fixed length, and every answer says what is left."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

from tests.hub import refusals


@dataclass(slots=True, kw_only=True)
class Meter:
    """Counts the API calls of one Hub.

    Attributes:
        calls: allowed in one window; 0 for no limit, and then no headers either.
        window_s: length of a window in seconds.
    """

    calls: int
    window_s: float
    _begin_s: float = field(default_factory=time.monotonic)
    _used: int = 0

    def refusal(self) -> refusals.RefusedError | None:
        """Count a call; return the 429 to answer with where it is one too many."""
        if not self.calls:
            return None
        now_s = time.monotonic()
        if now_s - self._begin_s >= self.window_s:
            self._begin_s, self._used = now_s, 0
        self._used += 1
        if self._used <= self.calls:
            return None
        message = (
            f"We had to rate limit you, you hit the quota of {self.calls} api requests per {self.window_s:g} seconds "
            "period."
        )
        return refusals.RefusedError(429, message, headers=self.headers())

    def headers(self) -> dict[str, str]:
        """Return `RateLimit` and `RateLimit-Policy` as of now."""
        if not self.calls:
            return {}
        left_s = max(0, math.ceil(self._begin_s + self.window_s - time.monotonic()))
        return {
            "RateLimit": f'"api";r={max(0, self.calls - self._used)};t={left_s}',
            "RateLimit-Policy": f'"fixed window";"api";q={self.calls};w={math.ceil(self.window_s)}',
        }
