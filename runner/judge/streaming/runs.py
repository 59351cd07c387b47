"""Computations that stop wherever they come to a stage, and go on when they are given what it returned.

A run is a forward (or a whole `generate`) of transformers, unchanged, in a thread of its own. Only one thread works at
a time: the one that advances a run waits until the run stops or ends. So many runs can go through a model side by side,
each with its own masks, caches and hidden states, while the model has one stage in memory.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch
from torch import nn

_HERE = threading.local()


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """What a run stopped at: a stage by its path, and what it is called with."""

    path: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


def stop_here(call: Call) -> Any:
    """Have the run that this thread belongs to stop at `call`; return what it is given. None outside of a run."""
    run: Run | None = getattr(_HERE, "run", None)
    return None if run is None else run.stop_at(call)


class _Abandoned(Exception):
    """Ends the thread of a run that nobody will advance any more."""


class Run:
    """One computation; see the module's docstring."""

    def __init__(self, compute: Callable[[], Any], pool: ThreadPoolExecutor) -> None:
        """Take what to compute, and a pool that has a free thread for it."""
        self._compute = compute
        self._pool = pool
        self._stops: SimpleQueue[Call | None] = SimpleQueue()
        self._outputs: SimpleQueue[Any] = SimpleQueue()
        self._future: Future[Any] | None = None

    def advance(self, output: Any = None) -> Call | None:
        """Go on with what the stage returned (nothing, to start); return where it stopped, or None at the end.

        Raises:
            Exception: what the computation raised.
        """
        if self._future is None:
            self._future = self._pool.submit(self._work)
            self._future.add_done_callback(lambda _: self._stops.put(None))
        else:
            self._outputs.put(output)
        call = self._stops.get()
        if call is None:
            self._future.result()
        return call

    def result(self) -> Any:
        """Return what was computed, once."""
        assert self._future is not None  # noqa: S101  (it has ended)
        value, self._future = self._future.result(), None
        return value

    def abandon(self) -> None:
        """End the run where it stands."""
        if self._future is not None and not self._future.done():
            self._outputs.put(_Abandoned())

    def stop_at(self, call: Call) -> Any:
        """Wait, in the run's own thread, for what the stage returns."""
        self._stops.put(call)
        output = self._outputs.get()
        if isinstance(output, _Abandoned):
            raise output
        return output

    def _work(self) -> Any:
        _HERE.run = self
        torch.set_num_threads(1)  # else every run would keep threads of its own for the little that it computes itself
        try:
            with torch.no_grad():
                return self._compute()
        finally:
            _HERE.run = None


@contextmanager
def stopping_at(model: nn.Module, stages: Sequence[str]) -> Iterator[Mapping[str, Callable[..., Any]]]:
    """Have runs through `model` stop at its stages; give the stages' own forwards, by path."""
    modules = {path: model.get_submodule(path) for path in stages}
    forwards = {path: module.forward for path, module in modules.items()}
    for path, module in modules.items():
        module.forward = _stop(path, forwards[path])
    try:
        yield forwards
    finally:
        for module in modules.values():
            del module.forward  # the instance's; the class's own appears again


def _stop(path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def stop(*args: Any, **kwargs: Any) -> Any:
        run: Run | None = getattr(_HERE, "run", None)
        return forward(*args, **kwargs) if run is None else run.stop_at(Call(path=path, args=args, kwargs=kwargs))

    return stop
