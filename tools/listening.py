"""Log where in `runner` a problem is told: runs in every process of a test, before the runner does."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_RUNNER = f"{ROOT / 'runner'}{os.sep}"


def listen(log: str) -> None:
    """Append `[file, line]` to `log` for every line of `runner` that is at work when a `Problem` is built.

    Each is one write of one line, so that processes that are killed or write at once leave whole lines.
    """
    from runner.protocol import errors

    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
    told: Any = errors.Problem.__init__

    def init(problem: errors.Problem, *args: Any, **kwargs: Any) -> None:
        told(problem, *args, **kwargs)
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            name = frame.f_code.co_filename
            if name.startswith(_RUNNER):
                line = json.dumps([str(Path(name).relative_to(ROOT)), frame.f_lineno])
                os.write(file, line.encode() + b"\n")
            frame = frame.f_back

    errors.Problem.__init__ = init  # type: ignore[method-assign, assignment]
