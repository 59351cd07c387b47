"""Semantics: the exact weight E does what PEFT's own unmerged layer does, module by module, in float64.

For every module that PEFT put in place of one of the base's, with x of K = 4 seeded vectors of ±1 (rows of the table
for embeddings):

    error = ‖E x − f(x)‖ / max(‖f(x) − W x‖, 1e-8·‖W x‖)        must be <= 1e-6

with f PEFT's unmerged forward of a float64 copy of that one module. Right merges were measured at 3.5e-10 and below,
a factor wrong by 2 % gives 2e-2. float32 is not enough: there a weak adapter drowns in rounding. The floor of the
denominator only matters to a delta below 1e-8 of the output, which no stored float can hold. Two methods (DEFT, C3A)
compute in float32 inside PEFT whatever they are given; for them the error is taken relative to ‖W x‖.
Parameters that PEFT changes in place (`target_parameters`: experts) have a probe of their own, `runner.verify.wrapped`.
Whole tensors that the adapter brings (`modules_to_save`) have nothing to compute: they must be equal in every bit.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from peft.tuners.lora.layer import ParamWrapper
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from runner.verify.exact import Exact
from runner.verify.models import LOAD_ERRORS, Unmerged, bare, first_line, is_transposed, merged_copy
from runner.verify.sources import Sources
from runner.verify.tensors import row_count
from runner.verify.wrapped import probe_parameters

LIMIT = 1e-6
PROBES = 4
MAX_ROWS = 1024  # of an embedding, besides those that differ most
_FLOOR = 1e-8
_SINGLE_PRECISION = frozenset({"DEFT", "C3A"})  # methods whose layers cast to float32 inside


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What probing one module gave.

    Attributes:
        module: its path.
        error: as defined above; 0.0 or inf for copies; None where the module could not be probed.
        detail: why not, or which parameter of a copy differs.
    """

    module: str
    error: float | None
    detail: str = ""


def probe_modules(unmerged: Unmerged, sources: Sources, seed: int) -> Iterator[Probe]:
    """Yield one probe per module that PEFT touches; a copy of one module in float64 is in memory at a time."""
    floor = 1.0 if sources.peft_type in _SINGLE_PRECISION else _FLOOR
    for number, (path, unit) in enumerate(unmerged.units.items()):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        try:
            with torch.no_grad():
                yield _probe(path, unit, sources, generator, floor)
        except LOAD_ERRORS as error:
            yield Probe(module=path, error=None, detail=f"PEFT's layer does not run in float64: {first_line(error)}")


def _probe(path: str, unit: nn.Module, sources: Sources, generator: torch.Generator, floor: float) -> Probe:
    if isinstance(unit, ModulesToSaveWrapper):
        return _probe_copy(path, unit, sources)
    if isinstance(unit, ParamWrapper):
        error, key = probe_parameters(path, unit, sources.matrix, generator)
        return Probe(module=path, error=error, detail=f"The parameter is {key}." if key else "")
    base = bare(unit)
    exact = _exact_module(path, unit, base, sources)
    inputs = _inputs(base, exact, generator)
    if inputs is None:
        return Probe(module=path, error=None, detail=f"no probe for a module of class {type(base).__name__}")
    twin = copy.deepcopy(unit).double().eval()
    wanted, plain, made = twin(inputs), bare(twin)(inputs), exact(inputs)
    effect = max(float((wanted - plain).norm()), floor * float(plain.norm()))
    distance = float((made - wanted).norm())
    if distance == 0.0:
        return Probe(module=path, error=0.0)
    return Probe(module=path, error=distance / effect if effect > 0 else float("inf"))


def _exact_module(path: str, unit: nn.Module, base: nn.Module, sources: Sources) -> nn.Module:
    """Return a float64 module of the base's class with E in place of W."""
    if path in sources.by_peft:
        return merged_copy(unit, torch.float64).eval()
    module = copy.deepcopy(base).double().eval()
    for name, parameter in module.named_parameters():
        if f"{path}.{name}" in sources.keys:
            parameter.data = _whole(sources.exact(f"{path}.{name}"))
    return module


def _inputs(base: nn.Module, exact: nn.Module, generator: torch.Generator) -> torch.Tensor | None:
    """Return what to feed the module: ±1 vectors, or row numbers; None for a class that takes something else."""
    if isinstance(base, nn.Embedding):
        table, merged = base.weight, exact.get_parameter("weight")
        change = (merged - table.double()).square().sum(dim=1)
        rows = row_count(tuple(table.shape))
        strongest = change.topk(min(rows, MAX_ROWS)).indices
        return torch.cat([strongest, torch.randint(rows, (min(rows, MAX_ROWS),), generator=generator)])
    weight = getattr(base, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.ndim not in (1, 2) or not weight.is_floating_point():
        return None
    width = weight.shape[0] if is_transposed(base) else weight.shape[-1]
    return torch.randint(0, 2, (PROBES, width), generator=generator).double() * 2 - 1


def _probe_copy(path: str, unit: nn.Module, sources: Sources) -> Probe:
    if path in sources.by_peft:  # a wrapper around a tuner layer, or one that the adapter has no tensor for
        return Probe(module=path, error=None, detail="a saved module that the adapter brings in parts")
    wrapper = unit.get_submodule("modules_to_save")
    for name, parameter in wrapper.get_submodule("default").state_dict().items():
        key = f"{path}.{name}"
        if not torch.equal(_whole(sources.exact(key)), parameter.double()):
            return Probe(module=path, error=float("inf"), detail=f"{key} is not the adapter's tensor")
    return Probe(module=path, error=0.0)


def _whole(exact: Exact) -> torch.Tensor:
    return exact.rows(0, row_count(exact.shape)).view(exact.shape)
