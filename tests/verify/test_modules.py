"""The probes of the semantics layer, on PEFT's own layers of a few elements: exact errors, and what cannot hide."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import pytest
import torch
from peft import LNTuningConfig, LoraConfig, get_peft_model
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

from runner.verify import modules, tensors
from runner.verify.exact import Exact
from runner.verify.experts import wrappers
from runner.verify.fused import ExactValue
from runner.verify.models import bare
from runner.verify.modules import LIMIT, PROBES, Probe, probe_modules
from runner.verify.sources import Sources
from runner.verify.unmerged import Unmerged

NAME = "inner"
RIGHT = 1e-12  # of a right E


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class _Net(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.other = nn.Linear(1, 1)


class _Units:
    """The units of an unmerged model whose values are all in memory."""

    def __init__(self, units: Mapping[str, nn.Module]) -> None:
        self.units = units

    @contextmanager
    def in_memory(self, path: str, *, single: bool = False) -> Iterator[None]:
        yield


class _Values:
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


def _unit(inner: nn.Module, **fields: Any) -> nn.Module:
    """Return PEFT's LoRA layer around a module, its factors random."""
    config = LoraConfig(**{"r": 2, "lora_alpha": 4, "target_modules": [NAME], "init_lora_weights": False, **fields})
    unit: nn.Module = get_peft_model(_Net(inner), config).get_base_model().inner
    return unit.requires_grad_(False)


def _sum(unit: Any) -> torch.Tensor:
    """Return W + ΔW in float64, from PEFT's factors."""
    base = bare(unit)
    if isinstance(base, nn.Embedding):
        a, b = unit.lora_embedding_A["default"], unit.lora_embedding_B["default"]
    else:
        a, b = unit.lora_A["default"].weight, unit.lora_B["default"].weight
    delta: torch.Tensor = unit.scaling["default"] * (b.double() @ a.double())
    return base.get_parameter("weight").double() + (delta.T if isinstance(base, nn.Embedding | Conv1D) else delta)


def _probe(
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
    sources = cast("Sources", _Values(values, by_peft, peft_type))
    (probe,) = probe_modules(cast("Unmerged", _Units({NAME: unit})), sources, seed)
    return probe


def _error(*args: Any, **options: Any) -> float:
    found = _probe(*args, **options)
    assert found.module == NAME
    assert found.error is not None, found
    return found.error


def _linear(weight: float) -> nn.Module:
    """Return a layer of one weight, whose adapter does nothing."""
    inner = nn.Linear(1, 1, bias=False)
    inner.weight.data.fill_(weight)
    return _unit(inner, r=1, init_lora_weights=True)


KINDS: dict[str, Callable[[], Any]] = {
    "linear": lambda: nn.Linear(5, 7, bias=False),
    "bias": lambda: nn.Linear(6, 6),
    "conv1d": lambda: Conv1D(7, 5),
    "square conv1d": lambda: Conv1D(6, 6),
    "embedding": lambda: nn.Embedding(9, 4),
    "scaled embedding": lambda: Gemma3TextScaledWordEmbedding(9, 4, 0, embed_scale=3.0),
}


@pytest.mark.parametrize("block", [8, tensors.BLOCK_ELEMENTS])
@pytest.mark.parametrize("kind", KINDS)
def test_the_right_sum_does_what_the_layer_does_and_two_percent_more_does_not(
    kind: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensors, "BLOCK_ELEMENTS", block)
    unit = _unit(KINDS[kind](), fan_in_fan_out="conv1d" in kind)
    right = _sum(unit)
    plain = bare(unit).get_parameter("weight").double()

    assert _error(unit, right) <= RIGHT
    assert _error(unit, plain + 1.02 * (right - plain)) == pytest.approx(0.02, rel=1e-6)
    assert _error(unit, plain) == pytest.approx(1.0)


def test_the_bias_counts_once_and_as_the_merge_has_it() -> None:
    unit = _unit(nn.Linear(5, 7), lora_bias=True)
    factor = cast("Any", unit).lora_B["default"]
    bias = bare(unit).get_parameter("bias").double()
    moved = bias + cast("Any", unit).scaling["default"] * factor.bias.double()

    assert _error(unit, _sum(unit), bias=moved) <= RIGHT
    assert _error(unit, _sum(unit), bias=bias) > 0.1
    assert _error(unit, _sum(unit)) > 0.1  # the base's, where the merge has none of its own


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_a_probe_is_a_random_vector_of_plus_and_minus_one(kind: str) -> None:
    unit = _unit(KINDS[kind](), fan_in_fan_out=kind == "conv1d")
    seen: list[torch.Tensor] = []

    def see(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        seen.append(args[0])

    unit.register_forward_pre_hook(see)

    for seed in (0, 1):
        _probe(unit, _sum(unit), seed=seed)

    assert [vectors.shape for vectors in seen] == [(PROBES, 5), (PROBES, 5)]
    assert all(set(vectors.flatten().tolist()) == {-1.0, 1.0} for vectors in seen)
    assert not torch.equal(*seen)


def test_inputs_that_changed_places_do_not_hide_behind_a_sum() -> None:
    unit = _unit(nn.Linear(6, 4, bias=False))
    right, plain = _sum(unit), bare(unit).get_parameter("weight").double()

    assert _error(unit, plain + (right - plain).roll(1, dims=1)) > 0.1


@pytest.mark.parametrize("by_peft", [False, True])
def test_a_wrong_row_of_a_large_table_is_looked_up(by_peft: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = nn.Embedding(8 * modules.MAX_ROWS, 2)
    wrong_row = 4321
    inner.weight.data[wrong_row] = 0.0
    unit = _unit(inner, init_lora_weights=True)
    wrong = inner.weight.detach().double().clone()
    wrong[wrong_row] = 1e-3  # small beside what the others hold, large beside how they change
    merged = nn.Embedding(8 * modules.MAX_ROWS, 2)
    merged.weight.data = wrong
    monkeypatch.setattr(modules, "merged_copy", lambda *_: merged)

    assert _error(unit, wrong, by_peft=by_peft) > LIMIT


def test_a_table_that_shortens_its_rows_computes_something_else_than_its_sum() -> None:
    inner = nn.Embedding(4, 2, max_norm=1.0)
    inner.weight.data = torch.tensor([[0.9, 0.0], [0.0, 0.9], [0.1, 0.1], [0.2, 0.0]])
    unit = cast("Any", _unit(inner, r=1, lora_alpha=1))
    unit.lora_embedding_A["default"].data = torch.full((1, 4), 0.5)

    unit.lora_embedding_B["default"].data = torch.tensor([[0.1], [0.1]])
    assert _error(unit, _sum(unit)) <= RIGHT  # no row of the sum is longer than 1
    unit.lora_embedding_B["default"].data = torch.tensor([[1.0], [1.0]])
    assert _error(unit, _sum(unit)) > 0.1
    assert _error(unit, by_peft=True) > 0.1


def test_an_error_is_relative_to_what_the_adapter_does_be_it_ever_so_little() -> None:
    unit = _unit(nn.Linear(5, 7, bias=False))
    cast("Any", unit).lora_B["default"].weight.data *= 1e-5
    right, plain = _sum(unit), bare(unit).get_parameter("weight").double()

    assert _error(unit, plain + 1.5 * (right - plain)) == pytest.approx(0.5)


def test_an_adapter_without_effect_is_held_against_its_layer() -> None:
    # Four probes of ±1: ‖Wx‖ = 2·4, and an E that is off by d is 2·d away.
    assert _error(_linear(4.0), torch.tensor([[4.0]])) == 0.0
    assert _error(_linear(4.0), torch.tensor([[4.0 + 1e-12]]).double()) < LIMIT * 1e3
    assert _error(_linear(4.0), torch.full((1, 1), 4.0 + 2**-36, dtype=torch.float64)) == 2**-35 / (1e-8 * 8.0)
    assert _error(_linear(4.0), torch.full((1, 1), 5.0)) == 2.0 / (1e-8 * 8.0)


@pytest.mark.parametrize("peft_type", ["DEFT", "C3A"])
def test_a_method_of_single_precision_is_held_against_its_layer_whatever_it_does(peft_type: str) -> None:
    off = torch.full((1, 1), 4.0 + 2**-10)
    assert _error(_linear(4.0), off, peft_type=peft_type) == 2**-9 / 8.0
    assert _error(_linear(4.0), off, peft_type="LORA") == 2**-9 / (1e-8 * 8.0)


@pytest.mark.parametrize("off", [0.5, 1.0])
def test_a_layer_of_zeros_has_no_error_or_an_infinite_one(off: float) -> None:
    assert _error(_linear(0.0), torch.zeros(1, 1)) == 0.0
    assert _error(_linear(0.0), torch.full((1, 1), off)) == math.inf  # 0.5: at a distance of just 1


def test_what_is_no_number_is_no_small_error() -> None:
    unit = _unit(nn.Linear(5, 7, bias=False))
    error = _error(unit, torch.full((7, 5), torch.nan))
    assert not error <= LIMIT


def test_a_layer_that_peft_merges_is_probed_like_any_other() -> None:
    norm = nn.LayerNorm(5)
    unit = get_peft_model(_Net(norm), LNTuningConfig(target_modules=[NAME])).get_base_model().inner
    cast("Any", unit).ln_tuning_layers["default"].weight.data += 0.5

    assert _error(unit.requires_grad_(False), by_peft=True) <= RIGHT


@pytest.mark.parametrize(
    "kind, build", [("Conv2d", lambda: nn.Conv2d(3, 2, 2)), ("MultiheadAttention", lambda: nn.MultiheadAttention(4, 2))]
)
def test_a_layer_of_an_unknown_kind_is_told_and_has_no_error(kind: str, build: Callable[[], nn.Module]) -> None:
    found = _probe(_unit(build()), by_peft=True)
    assert (found.error, found.detail) == (None, f"no probe for a module of class {kind}")


def test_a_layer_that_does_not_run_is_told_and_has_no_error() -> None:
    unit = _unit(nn.Linear(5, 7))

    def fail(*_: Any) -> None:
        raise RuntimeError("no kernel\nfor this")

    unit.register_forward_pre_hook(fail)
    found = _probe(unit, _sum(unit))
    assert (found.error, found.detail) == (None, "PEFT's layer does not run in float64: no kernel")


def test_a_saved_module_is_equal_in_every_element() -> None:
    unit = _unit(nn.Linear(5, 7), target_modules=["other"], modules_to_save=[NAME])
    saved = {name: value.clone() for name, value in cast("Any", unit).modules_to_save["default"].state_dict().items()}

    assert _probe(unit, **saved) == Probe(module=NAME, error=0.0)
    saved["bias"][3] += 1e-6
    assert _probe(unit, **saved) == Probe(module=NAME, error=math.inf, detail="inner.bias is not the adapter's tensor")
    found = _probe(unit, by_peft=True, **saved)
    assert (found.error, found.detail) == (None, "a saved module that the adapter brings in parts")


# ---- parameters that PEFT changes in place


class _Experts(nn.Module):
    def __init__(self, up: torch.Tensor, down: torch.Tensor) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(up), nn.Parameter(down)


def _experts(up: torch.Tensor, down: torch.Tensor | None = None, **fields: Any) -> tuple[nn.Module, dict[str, Any]]:
    """Return a unit whose parameters PEFT changes, stacks of one matrix for each expert, and E of each."""
    down = torch.zeros_like(up) if down is None else down
    unit = _unit(
        _Experts(up, down), target_modules=[], target_parameters=[f"{NAME}.up", f"{NAME}.down"], **fields
    )  # fmt: skip
    exact: dict[str, Any] = {}
    for name, wrapper, _ in wrappers(unit):
        left, right, scaling = wrapper.get_delta_factors("default")
        exact[name] = wrapper.get_param().detach().double() + scaling * (left.double() @ right.double())
    assert exact.keys() == {"up", "down"}
    return unit, exact


def test_the_worst_parameter_that_peft_changes_in_place_is_named() -> None:
    unit, exact = _experts(torch.randn(2, 3, 4), torch.randn(2, 4, 3))
    assert _error(unit, **exact) <= RIGHT
    for name in exact:
        wrong = exact | {name: exact[name].flip(0)}  # each expert is the other
        found = _probe(unit, **wrong)
        assert found.error is not None
        assert found.error > 0.1
        assert found.detail == f"The parameter is inner.{name}."


def test_a_factor_of_an_experts_change_is_its_error() -> None:
    up = torch.randn(2, 3, 4)
    unit, exact = _experts(up, torch.randn(2, 4, 3))
    wrong = exact | {"up": up.double() + 1.02 * (exact["up"] - up.double())}
    assert _error(unit, **wrong) == pytest.approx(0.02, rel=1e-6)
    wrong = exact | {"up": up.double() + (exact["up"] - up.double()).roll(1, dims=2)}  # inputs change places
    assert _error(unit, **wrong) > 0.1


def test_an_expert_that_nothing_changes_is_held_against_its_matrices() -> None:
    # Four probes of ±1 on matrices of one element: ‖Mx‖ = 2·√(3² + 4²), and one that is off by d is 2·d away.
    up = torch.tensor([3.0, 4.0]).view(2, 1, 1)
    unit, exact = _experts(up, up.clone(), r=1, init_lora_weights=True)
    assert _probe(unit, **exact) == Probe(module=NAME, error=0.0)
    for off in (0.5, 2.0**-30):
        wrong = exact | {"up": exact["up"] + torch.tensor([0.0, off]).view(2, 1, 1)}
        assert _error(unit, **wrong) == pytest.approx(2 * off / (1e-8 * 10.0), rel=1e-12)


@pytest.mark.parametrize("off", [0.25, 0.5])
def test_experts_of_zeros_have_no_error_or_an_infinite_one(off: float) -> None:
    unit, exact = _experts(torch.zeros(2, 1, 1), r=1, init_lora_weights=True)
    assert _probe(unit, **exact) == Probe(module=NAME, error=0.0)
    assert _error(unit, **(exact | {"down": torch.tensor([0.0, off]).view(2, 1, 1)})) == math.inf


def test_an_expert_that_is_no_number_is_no_small_error() -> None:
    unit, exact = _experts(torch.randn(2, 3, 4), torch.randn(2, 4, 3))
    assert not _error(unit, **(exact | {"up": exact["up"] * torch.nan})) <= LIMIT
