"""How much of a download has arrived: what the client would show on its progress bars, counted and not drawn."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Self

OnDownload = Callable[[int, int, str], None]  # bytes that are there, bytes in all, what is being done


class Meter:
    """The bytes of one download.

    The client makes two bars in bytes for all files together, of what was received and of what is on the disk. Over
    Xet they differ on the way, and both end at the size of the files; the one that is ahead tells how far it is.
    """

    def __init__(self, tell: OnDownload, total: int, doing: str) -> None:
        """Tell `tell` of up to `total` bytes; of nothing, where that is 0."""
        self._tell, self._total, self._doing = tell, total, doing
        self._done = 0
        self._lock = threading.Lock()

    def take(self, done: int) -> None:
        """Take note that a bar stands at `done` bytes."""
        with self._lock:
            self._done = max(self._done, min(done, self._total))
            if self._total:
                self._tell(self._done, self._total, self._doing)

    def bar(self, *_args: object, unit: str = "it", **_kwargs: object) -> Bar:
        """Return what the client takes for a progress bar."""
        return Bar(self.take if unit == "B" else lambda _done: None)


class Bar:
    """What huggingface_hub asks of tqdm, without a display. Used by several threads."""

    total: float | None = 0

    def __init__(self, take: Callable[[int], None]) -> None:
        """Tell `take` where the bar stands, each time that it moves."""
        self.n = 0
        self.format_dict: dict[str, Any] = {}
        self._take = take
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def update(self, n: float | None = 1) -> None:
        """Move by `n`, backwards too."""
        with self._lock:
            self.n += int(n or 0)
        self._take(self.n)

    def refresh(self) -> None:
        """Draw nothing."""

    def close(self) -> None:
        """Do nothing."""

    def set_description(self, *_args: object, **_kwargs: object) -> None:
        """Show no description."""

    set_description_str = set_postfix_str = set_description
