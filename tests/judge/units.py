"""PEFT's own layers of a few elements, and what the probes say of them for any E."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from runner.judge.expected.exact import Exact
from runner.judge.expected.fused import ExactValue
from runner.judge.expected.sources import Sources
from runner.judge.expected.unmerged import Unmerged
from runner.judge.semantics import Probe, probe_modules
from runner.judge.streaming.models import bare

NAME = "inner"
RIGHT = 1e-12  # of a right E


class Net(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.other = nn.Linear(1, 1)


class Units:
    """The units of an unmerged model whose values are all in memory."""

    def __init__(self, units: Mapping[str, nn.Module]) -> None:
        self.units = units

    @contextmanager
    def in_memory(self, path: str, *, single: bool = False) -> Iterator[None]:
        yield


class Values:
    """E of every parameter, as given."""

    def __init__(self, values: Mapping[str, torch.Tensor], by_peft: bool, peft_type: str) -> None:
        self._values = values
        self.keys = values.keys()
        self.by_peft = {NAME} if by_peft else set[str]()
        self.peft_type = peft_type

    def exact(self, key: str) -> Exact:
        return ExactValue(self._values[key])

    def matrix(self, key: str, expert: int) -> torch.Tensor:
        return self._values[key][expert].double()


def unit_of(inner: nn.Module, **fields: Any) -> nn.Module:
    """Return PEFT's LoRA layer around a module, its factors random."""
    config = LoraConfig(**{"r": 2, "lora_alpha": 4, "target_modules": [NAME], "init_lora_weights": False, **fields})
    unit: nn.Module = get_peft_model(Net(inner), config).get_base_model().inner
    return unit.requires_grad_(False)


def sum_of(unit: Any) -> torch.Tensor:
    """Return W + ΔW in float64, from PEFT's factors."""
    base = bare(unit)
    if isinstance(base, nn.Embedding):
        a, b = unit.lora_embedding_A["default"], unit.lora_embedding_B["default"]
    else:
        a, b = unit.lora_A["default"].weight, unit.lora_B["default"].weight
    delta: torch.Tensor = unit.scaling["default"] * (b.double() @ a.double())
    return base.get_parameter("weight").double() + (delta.T if isinstance(base, nn.Embedding | Conv1D) else delta)


def probe_of(
    unit: nn.Module,
    weight: torch.Tensor | None = None,
    *,
    by_peft: bool = False,
    peft_type: str = "LORA",
    seed: int = 0,
    **others: torch.Tensor,
) -> Probe:
    """Probe the unit with `weight` as E of its weight."""
    values = {f"{NAME}.{name}": value for name, value in {"weight": weight, **others}.items() if value is not None}
    sources = cast("Sources", Values(values, by_peft, peft_type))
    (probe,) = probe_modules(cast("Unmerged", Units({NAME: unit})), sources, seed)
    return probe


def error_of(*args: Any, **options: Any) -> float:
    found = probe_of(*args, **options)
    assert found.module == NAME
    assert found.error is not None, found
    return found.error
