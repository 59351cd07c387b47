"""A second look in float64 reaches what an adapter holds in buffers."""

from __future__ import annotations

import torch
from torch import nn

from runner.judge.streaming.stream import on_device


def test_floats_in_buffers_compute_in_the_dtype_that_is_asked_for() -> None:
    module = nn.BatchNorm1d(2)
    with on_device([module], "cpu", torch.float64):
        assert module.running_mean is not None
        assert module.num_batches_tracked is not None
        assert (module.running_mean.dtype, module.weight.dtype) == (torch.float64, torch.float64)
        assert module.num_batches_tracked.dtype == torch.int64
        assert bool(module.eval()(torch.ones(1, 2, dtype=torch.float64)).isfinite().all())
    assert (module.running_mean.dtype, module.weight.dtype) == (torch.float32, torch.float32)
