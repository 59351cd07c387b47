"""The probes of the semantics layer, on PEFT's own layers of a few elements: exact errors, and what cannot hide."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from peft import LNTuningConfig, get_peft_model
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

from runner.judge import semantics as modules
from runner.judge.numbers import tensors
from runner.judge.semantics import LIMIT, PROBES, Probe
from runner.judge.streaming.models import bare, merged_copy
from tests.judge.units import NAME, RIGHT, Net, error_of, probe_of, sum_of, unit_of


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _linear(weight: float) -> nn.Module:
    """Return a layer of one weight, whose adapter does nothing."""
    inner = nn.Linear(1, 1, bias=False)
    inner.weight.data.fill_(weight)
    return unit_of(inner, r=1, init_lora_weights=True)


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
    unit = unit_of(KINDS[kind](), fan_in_fan_out="conv1d" in kind)
    right = sum_of(unit)
    plain = bare(unit).get_parameter("weight").double()

    assert error_of(unit, right) <= RIGHT
    assert error_of(unit, plain + 1.02 * (right - plain)) == pytest.approx(0.02, rel=1e-6)
    assert error_of(unit, plain) == pytest.approx(1.0)


def test_the_bias_counts_once_and_as_the_merge_has_it() -> None:
    unit = unit_of(nn.Linear(5, 7), lora_bias=True)
    factor = cast("Any", unit).lora_B["default"]
    bias = bare(unit).get_parameter("bias").double()
    moved = bias + cast("Any", unit).scaling["default"] * factor.bias.double()

    assert error_of(unit, sum_of(unit), bias=moved) <= RIGHT
    assert error_of(unit, sum_of(unit), bias=bias) > 0.1
    assert error_of(unit, sum_of(unit)) > 0.1  # the base's, where the merge has none of its own


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_a_probe_is_a_random_vector_of_plus_and_minus_one(kind: str) -> None:
    unit = unit_of(KINDS[kind](), fan_in_fan_out=kind == "conv1d")
    seen: list[torch.Tensor] = []

    def see(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        seen.append(args[0])

    unit.register_forward_pre_hook(see)

    for seed in (0, 1):
        probe_of(unit, sum_of(unit), seed=seed)

    assert [vectors.shape for vectors in seen] == [(PROBES, 5), (PROBES, 5)]
    assert all(set(vectors.flatten().tolist()) == {-1.0, 1.0} for vectors in seen)
    assert not torch.equal(*seen)


def test_inputs_that_changed_places_do_not_hide_behind_a_sum() -> None:
    unit = unit_of(nn.Linear(6, 4, bias=False))
    right, plain = sum_of(unit), bare(unit).get_parameter("weight").double()

    assert error_of(unit, plain + (right - plain).roll(1, dims=1)) > 0.1


@pytest.mark.parametrize("by_peft", [False, True])
def test_a_wrong_row_of_a_large_table_is_looked_up(by_peft: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = nn.Embedding(8 * modules.MAX_ROWS, 2)
    wrong_row = 4321
    inner.weight.data[wrong_row] = 0.0
    unit = unit_of(inner, init_lora_weights=True)
    wrong = inner.weight.detach().double().clone()
    wrong[wrong_row] = 1e-3  # small beside what the others hold, large beside how they change
    merged = nn.Embedding(8 * modules.MAX_ROWS, 2)
    merged.weight.data = wrong
    monkeypatch.setattr(modules, "merged_copy", lambda *_: merged)

    assert error_of(unit, wrong, by_peft=by_peft) > LIMIT


def test_a_table_that_shortens_its_rows_computes_something_else_than_its_sum() -> None:
    inner = nn.Embedding(4, 2, max_norm=1.0)
    inner.weight.data = torch.tensor([[0.9, 0.0], [0.0, 0.9], [0.1, 0.1], [0.2, 0.0]])
    unit = cast("Any", unit_of(inner, r=1, lora_alpha=1))
    unit.lora_embedding_A["default"].data = torch.full((1, 4), 0.5)

    unit.lora_embedding_B["default"].data = torch.tensor([[0.1], [0.1]])
    assert error_of(unit, sum_of(unit)) <= RIGHT  # no row of the sum is longer than 1
    unit.lora_embedding_B["default"].data = torch.tensor([[1.0], [1.0]])
    assert error_of(unit, sum_of(unit)) > 0.1
    assert error_of(unit, by_peft=True) > 0.1


def test_an_error_is_relative_to_what_the_adapter_does_be_it_ever_so_little() -> None:
    unit = unit_of(nn.Linear(5, 7, bias=False))
    cast("Any", unit).lora_B["default"].weight.data *= 1e-5
    right, plain = sum_of(unit), bare(unit).get_parameter("weight").double()

    assert error_of(unit, plain + 1.5 * (right - plain)) == pytest.approx(0.5)


def test_an_adapter_without_effect_is_held_against_its_layer() -> None:
    # Four probes of ±1: ‖Wx‖ = 2·4, and an E that is off by d is 2·d away.
    assert error_of(_linear(4.0), torch.tensor([[4.0]])) == 0.0
    assert error_of(_linear(4.0), torch.tensor([[4.0 + 1e-12]]).double()) < LIMIT * 1e3
    assert error_of(_linear(4.0), torch.full((1, 1), 4.0 + 2**-36, dtype=torch.float64)) == 2**-35 / (1e-8 * 8.0)
    assert error_of(_linear(4.0), torch.full((1, 1), 5.0)) == 2.0 / (1e-8 * 8.0)


@pytest.mark.parametrize("peft_type", ["DEFT", "C3A"])
def test_a_method_of_single_precision_is_held_against_its_layer_whatever_it_does(peft_type: str) -> None:
    off = torch.full((1, 1), 4.0 + 2**-10)
    assert error_of(_linear(4.0), off, peft_type=peft_type) == 2**-9 / 8.0
    assert error_of(_linear(4.0), off, peft_type="LORA") == 2**-9 / (1e-8 * 8.0)


@pytest.mark.parametrize("off", [0.5, 1.0])
def test_a_layer_of_zeros_has_no_error_or_an_infinite_one(off: float) -> None:
    assert error_of(_linear(0.0), torch.zeros(1, 1)) == 0.0
    assert error_of(_linear(0.0), torch.full((1, 1), off)) == math.inf  # 0.5: at a distance of just 1


def test_what_is_no_number_is_no_small_error() -> None:
    unit = unit_of(nn.Linear(5, 7, bias=False))
    error = error_of(unit, torch.full((7, 5), torch.nan))
    assert not error <= LIMIT


def test_a_layer_that_peft_merges_is_probed_like_any_other() -> None:
    norm = nn.LayerNorm(5)
    unit = get_peft_model(Net(norm), LNTuningConfig(target_modules=[NAME])).get_base_model().inner
    cast("Any", unit).ln_tuning_layers["default"].weight.data += 0.5

    assert error_of(unit.requires_grad_(False), by_peft=True) <= RIGHT


CONVOLUTIONS: dict[str, Callable[[], nn.Module]] = {
    "1d": lambda: nn.Conv1d(4, 6, 3, padding=1),
    "2d": lambda: nn.Conv2d(3, 5, (2, 4), stride=2),
    "2d, of one place": lambda: nn.Conv2d(3, 5, 1),
    "3d": lambda: nn.Conv3d(3, 4, (2, 3, 3), stride=(2, 3, 3)),
}
DAMAGES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "2 % too much": lambda plain, right: plain + 1.02 * (right - plain),
    "a kernel turned round": lambda plain, right: plain + (right - plain).flip(-1),
    "one channel without its delta": lambda plain, right: torch.cat([plain[:1], right[1:]]),
    "not applied": lambda plain, _: plain,
}


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_a_convolution_is_probed(kind: str, use_dora: bool) -> None:
    unit = unit_of(CONVOLUTIONS[kind](), use_dora=use_dora)
    plain = bare(unit).get_parameter("weight").double()
    right = merged_copy(unit, torch.float64).get_parameter("weight")

    assert error_of(unit, by_peft=True) <= RIGHT
    assert error_of(unit, right) <= RIGHT
    for name, damage in DAMAGES.items():
        wrong = damage(plain, right)
        assert torch.allclose(wrong, right) or error_of(unit, wrong) > 1e-3, name


@pytest.mark.parametrize("damage", DAMAGES)
def test_multi_head_attention_is_probed(damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    unit = unit_of(nn.MultiheadAttention(8, 2))
    plain = bare(unit).get_parameter("in_proj_weight").double()
    right = merged_copy(unit, torch.float64)

    assert error_of(unit, by_peft=True) <= RIGHT
    weight = right.get_parameter("in_proj_weight")
    weight.data = DAMAGES[damage](plain, weight.data)
    monkeypatch.setattr(modules, "merged_copy", lambda *_: right)
    assert error_of(unit, by_peft=True) > 1e-3


class Odd(nn.Module):
    """A layer that no probe knows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 2, 2))


def test_a_layer_of_an_unknown_kind_is_told_and_has_no_error() -> None:
    unit = get_peft_model(Net(Odd()), LNTuningConfig(target_modules=[NAME])).get_base_model().inner
    found = probe_of(unit, by_peft=True)
    assert (found.error, found.detail) == (None, "no probe for a module of class Odd")


def test_a_layer_that_does_not_run_is_told_and_has_no_error() -> None:
    unit = unit_of(nn.Linear(5, 7))

    def fail(*_: Any) -> None:
        raise RuntimeError("no kernel\nfor this")

    unit.register_forward_pre_hook(fail)
    found = probe_of(unit, sum_of(unit))
    assert (found.error, found.detail) == (None, "PEFT's layer does not run in float64: no kernel")


def test_a_saved_module_is_equal_in_every_element() -> None:
    unit = unit_of(nn.Linear(5, 7), target_modules=["other"], modules_to_save=[NAME])
    saved = {name: value.clone() for name, value in cast("Any", unit).modules_to_save["default"].state_dict().items()}

    assert probe_of(unit, **saved) == Probe(module=NAME, error=0.0)
    saved["bias"][3] += 1e-6
    assert probe_of(unit, **saved) == Probe(
        module=NAME, error=math.inf, detail="inner.bias is not the adapter's tensor"
    )
    found = probe_of(unit, by_peft=True, **saved)
    assert (found.error, found.detail) == (None, "a saved module that the adapter brings in parts")
