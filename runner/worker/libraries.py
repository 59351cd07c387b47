"""Importing torch, transformers and peft without the garbage collector, and leaving without taking them down.

The libraries make some two million objects that stay. While they do, the collector walks through all of them again
and again and finds nothing: a third of the time that the imports take (docs/performance.md).
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quick_imports() -> Iterator[None]:
    """Import what the block imports with the collector off; what exists afterwards is never looked at again.

    For the first lines of a program: the collector is on afterwards, whatever it was before.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def leave(code: int) -> None:
    """End this process now: output is flushed, and the libraries' objects are left to the kernel.

    Taking torch down in an orderly way takes longer than many a merge's plan.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
