"""Several calls of one stage side by side, so that each of its linear layers is one product for all of them.

A linear layer does the same to every row, whatever sequence the row is of. So calls with inputs of any lengths need no
padding: each is a run of its own that stops at every `nn.Linear`, where the rows of all calls that wait at the same one
are multiplied as one matrix. All else (attention, norms, routers, masks) is computed call by call, by the model's own
code. The products are those of a call alone up to the order of their sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from runner.judge.streaming.runs import Call, Run, stop_here

_alone = nn.Linear.forward


def together(calls: Sequence[Callable[[], Any]], pool: ThreadPoolExecutor) -> list[Any]:
    """Return what the calls return.

    Args:
        calls: of one module, or of modules that share linear layers.
        pool: has a free thread for each of them.

    Raises:
        Exception: what one of them raised.
    """
    threads = torch.get_num_threads()
    runs = [Run(call, pool) for call in calls]
    try:
        with _stopping_at_linear_layers():
            waiting = [run.advance() for run in runs]
            torch.set_num_threads(threads)  # a run sets its own number, which MKL takes for everybody's
            while (first := next((call for call in waiting if call is not None), None)) is not None:
                layer = first.args[0]
                same = [place for place, call in enumerate(waiting) if call is not None and call.args[0] is layer]
                outputs = _multiply(layer, [rows_of(waiting[place]) for place in same])
                for place, output in zip(same, outputs, strict=True):
                    waiting[place] = runs[place].advance(output)
        return [run.result() for run in runs]
    finally:
        for run in runs:
            run.abandon()


def forward_of(stage: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return `forward`, the stage's own; of a stage that is a linear layer itself, one that stops as those in it do."""
    return partial(_meet, stage) if isinstance(stage, nn.Linear) and type(stage).forward is _alone else forward


def rows_of(call: Call | None) -> torch.Tensor:
    """Return what a linear layer was called with."""
    assert call is not None  # noqa: S101  (only those that wait are asked)
    rows: torch.Tensor = call.args[1]
    return rows


def _meet(layer: nn.Linear, rows: torch.Tensor) -> torch.Tensor:
    if rows.ndim < 2:  # one row, which has no dimension to be joined along
        return _alone(layer, rows)
    met = stop_here(Call(path="", args=(layer, rows), kwargs={}))
    return _alone(layer, rows) if met is None else met


@contextmanager
def _stopping_at_linear_layers() -> Iterator[None]:
    nn.Linear.forward = _meet  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Linear.forward = _alone  # type: ignore[method-assign]


def _multiply(layer: nn.Linear, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    flat = [rows.reshape(-1, rows.shape[-1]) for rows in inputs]
    joined = flat[0] if len(flat) == 1 else torch.cat(flat)
    made = torch.split(functional.linear(joined, layer.weight, layer.bias), [len(rows) for rows in flat])
    return [part.view(*rows.shape[:-1], part.shape[-1]) for part, rows in zip(made, inputs, strict=True)]
