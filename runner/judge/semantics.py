"""Semantics: the exact weight E does what PEFT's own unmerged layer does, module by module, in float64.

For every module that PEFT put in place of one of the base's, with x of K = 4 seeded vectors of ±1 (rows of the table
for embeddings):

    error = ‖E x − f(x)‖ / max(‖f(x) − W x‖, 1e-8·‖W x‖)        must be <= 1e-6

with f PEFT's unmerged forward of a float64 copy of that one module. Right merges were measured at 3.5e-10 and below,
a factor wrong by 2 % gives 2e-2. float32 is not enough: there a weak adapter drowns in rounding. The floor of the
denominator only matters to a delta below 1e-8 of the output, which no stored float can hold. Two methods (DEFT, C3A)
compute in float32 inside PEFT whatever they are given; for them the error is taken relative to ‖W x‖.
Parameters that PEFT changes in place (`target_parameters`: experts) have a probe of their own, `runner.judge.wrapped`.
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

from runner.judge.expected.exact import Exact
from runner.judge.expected.fused import ExactValue
from runner.judge.expected.sources import Sources
from runner.judge.expected.unmerged import Unmerged
from runner.judge.numbers.tensors import row_blocks, row_count
from runner.judge.streaming.models import LOAD_ERRORS, bare, first_line, is_transposed, merged_copy
from runner.judge.wrapped import probe_parameters

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
            with torch.no_grad(), unmerged.in_memory(path, single=isinstance(unit, ParamWrapper)):
                probe = _probe(path, unit, sources, generator, floor)
        except LOAD_ERRORS as error:
            probe = Probe(module=path, error=None, detail=f"PEFT's layer does not run in float64: {first_line(error)}")
        yield probe


def _probe(path: str, unit: nn.Module, sources: Sources, generator: torch.Generator, floor: float) -> Probe:
    if isinstance(unit, ModulesToSaveWrapper):
        return _probe_copy(path, unit, sources)
    if isinstance(unit, ParamWrapper):
        error, key = probe_parameters(path, unit, sources.matrix, generator)
        return Probe(module=path, error=error, detail=f"The parameter is {key}." if key else "")
    base = bare(unit)
    exact = _ExactModule(path, unit, base, sources)
    inputs = _inputs(base, exact, generator)
    if inputs is None:
        return Probe(module=path, error=None, detail=f"no probe for a module of class {type(base).__name__}")
    made = exact.forward(inputs)
    twin = copy.deepcopy(unit).double().eval()
    wanted, plain = _output(twin, inputs), _output(bare(twin), inputs)
    common = made.isnan() & wanted.isnan() & plain.isnan()  # rows of a head that the base never used
    made, wanted, plain = (output.masked_fill(common, 0.0) for output in (made, wanted, plain))
    effect = max(float((wanted - plain).norm()), floor * float(plain.norm()))
    distance = float((made - wanted).norm())
    if distance == 0.0:
        return Probe(module=path, error=0.0)
    return Probe(module=path, error=distance / effect if effect > 0 else float("inf"))


class _ExactModule:
    """The base's module with E in place of W, in float64; matrices and tables by blocks, the others whole."""

    def __init__(self, path: str, unit: nn.Module, base: nn.Module, sources: Sources):
        """Take the unit's path, PEFT's unit, the base's module inside it, and E."""
        self._path = path
        self._base = base
        self._sources = sources
        self._merged = merged_copy(unit, torch.float64).eval() if path in sources.by_peft else None

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return what the module makes of its inputs, float64."""
        if self._merged is not None:
            return _output(self._merged, inputs)
        if type(self._base) is nn.Embedding and self._base.max_norm is None:
            return self._look_up(inputs)
        if type(self._base) is nn.Linear or is_transposed(self._base):
            return self._multiply(inputs)
        module = copy.deepcopy(self._base).double().eval()
        for name, parameter in module.named_parameters():
            parameter.data = _whole(self._of(name))
        return _output(module, inputs)

    def change(self) -> torch.Tensor:
        """Return Σ (E − W)² of every row of a table."""
        table = self._base.get_parameter("weight")
        if self._merged is not None:
            return (self._merged.get_parameter("weight") - table.double()).square().sum(dim=1)
        exact = self._of("weight")
        blocks = ((exact.rows(*block), table[slice(*block)].double()) for block in row_blocks(exact.shape))
        return torch.cat([(rows - before).square().sum(dim=1) for rows, before in blocks])

    def _of(self, name: str) -> Exact:
        key = f"{self._path}.{name}"
        if key in self._sources.keys:
            return self._sources.exact(key)
        return ExactValue(self._base.get_parameter(name).detach())

    def _multiply(self, inputs: torch.Tensor) -> torch.Tensor:
        weight = self._of("weight")
        is_flipped = is_transposed(self._base)
        made = inputs.new_zeros(len(inputs), weight.shape[1 if is_flipped else 0])
        for start, stop in row_blocks(weight.shape):
            rows = weight.rows(start, stop)
            if is_flipped:
                made += inputs[:, start:stop] @ rows
            else:
                made[:, start:stop] = inputs @ rows.T
        return made if getattr(self._base, "bias", None) is None else made + _whole(self._of("bias"))

    def _look_up(self, inputs: torch.Tensor) -> torch.Tensor:
        weight = self._of("weight")
        made = torch.full((len(inputs), weight.shape[1]), torch.nan, dtype=torch.float64)
        for start, stop in row_blocks(weight.shape):
            inside = (inputs >= start) & (inputs < stop)
            if bool(inside.any()):
                made[inside] = weight.rows(start, stop)[inputs[inside] - start]
        return made


def _inputs(base: nn.Module, exact: _ExactModule, generator: torch.Generator) -> torch.Tensor | None:
    """Return what to feed the module: ±1 vectors, or row numbers; None for a class that takes something else."""
    if isinstance(base, nn.Embedding):
        rows = row_count(tuple(base.weight.shape))
        strongest = exact.change().topk(min(rows, MAX_ROWS)).indices
        return torch.cat([strongest, torch.randint(rows, (min(rows, MAX_ROWS),), generator=generator)])
    if isinstance(base, nn.MultiheadAttention):
        return _signs((PROBES, PROBES, base.embed_dim), generator)
    if isinstance(base, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return _signs((PROBES, base.in_channels, *_window(base)), generator)
    weight = getattr(base, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.ndim not in (1, 2):
        return None
    width = weight.shape[0] if is_transposed(base) else weight.shape[-1]
    return _signs((PROBES, width), generator)


def _signs(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, 2, shape, generator=generator).double() * 2 - 1


def _window(base: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> tuple[int, ...]:
    """Return a size on which the kernel has two places in every direction, without what is padded."""
    options = zip(base.kernel_size, base.dilation, base.stride, strict=True)
    return tuple(dilation * (kernel - 1) + 1 + stride for kernel, dilation, stride in options)


def _output(module: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """Return what the module makes of its inputs; attention takes them as queries, keys and values alike."""
    if isinstance(bare(module), nn.MultiheadAttention):
        attended: torch.Tensor = module(inputs, inputs, inputs)[0]
        return attended
    outputs: torch.Tensor = module(inputs)
    return outputs


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
