"""What the judge reads from an adapter's files: which rule each parameter gets, by which factor, and what has none."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from runner.judge.expected.recipe import (
    CONFIG_FILE,
    PREFIX,
    WEIGHTS_FILE,
    Copy,
    LowRank,
    Recipe,
    Shift,
    read_recipe,
    scaling_of,
)
from runner.protocol.errors import BrokenAdapter

MODEL = ("m.q.weight", "m.q.bias", "m.k.weight", "embed.weight", "head.weight")
A, B = f"{PREFIX}m.q.lora_A.weight", f"{PREFIX}m.q.lora_B.weight"
Shapes = Mapping[str, tuple[int, ...]]
PAIR = {"m.q.lora_A.weight": (2, 5), "m.q.lora_B.weight": (7, 2)}
TOKENS = ".token_adapter.trainable_tokens_delta"


def _read(folder: Path, shapes: Shapes, fused: tuple[str, ...] = (), **config: Any) -> Recipe:
    folder.mkdir(exist_ok=True)
    save_file({f"{PREFIX}{name}": torch.ones(shape) for name, shape in shapes.items()}, folder / WEIGHTS_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 6, **config}))
    return read_recipe(folder, MODEL, fused)


def _pair(**fields: Any) -> LowRank:
    usual = {"a": A, "b": B, "scaling": 3.0, "rank": 2, "is_embedding": False, "replaced_base": None}
    return LowRank(**{**usual, **fields})


def test_a_pair_of_factors(tmp_path: Path) -> None:
    recipe = _read(tmp_path, PAIR)
    assert dict(recipe.rules) == {"m.q.weight": _pair()}
    assert (recipe.peft_type, dict(recipe.stored), recipe.others, recipe.redundant) == ("LORA", {}, (), ())


def test_factors_of_an_embedding(tmp_path: Path) -> None:
    a, b = "embed.lora_embedding_A", "embed.lora_embedding_B"
    rules = _read(tmp_path, {a: (2, 9), b: (4, 2)}).rules
    assert dict(rules) == {"embed.weight": _pair(a=f"{PREFIX}{a}", b=f"{PREFIX}{b}", is_embedding=True)}


def test_a_bias_that_was_trained_with_the_factors(tmp_path: Path) -> None:
    rules = _read(tmp_path, {**PAIR, "m.q.lora_B.bias": (7,)}).rules
    assert dict(rules) == {"m.q.weight": _pair(), "m.q.bias": Shift(tensor=f"{PREFIX}m.q.lora_B.bias", scaling=3.0)}


def test_whole_tensors_of_the_base_layer(tmp_path: Path) -> None:
    weight, bias = "m.q.base_layer.weight", "m.q.base_layer.bias"
    both = _read(tmp_path, {**PAIR, weight: (7, 5), bias: (7,)}).rules
    assert dict(both) == {
        "m.q.weight": _pair(replaced_base=f"{PREFIX}{weight}"), "m.q.bias": Copy(tensor=f"{PREFIX}{bias}")
    }  # fmt: skip
    alone = _read(tmp_path, {weight: (7, 5)}).rules
    assert dict(alone) == {"m.q.weight": Copy(tensor=f"{PREFIX}{weight}")}
    assert dict(_read(tmp_path, {bias: (7,)}).rules) == {"m.q.bias": Copy(tensor=f"{PREFIX}{bias}")}


def test_whole_parameters_are_copied_and_their_repetitions_left_aside(tmp_path: Path) -> None:
    repeated = {"head.modules_to_save.weight": (9, 4), "head.original_module.weight": (9, 4)}
    recipe = _read(tmp_path, {"head.weight": (9, 4), **repeated})
    assert dict(recipe.rules) == {"head.weight": Copy(tensor=f"{PREFIX}head.weight")}
    assert recipe.redundant == tuple(f"{PREFIX}{name}" for name in repeated)
    assert recipe.others == ()
    alone = _read(tmp_path, repeated)  # repeats nothing
    assert (dict(alone.rules), alone.redundant) == ({}, ())
    assert alone.others == tuple(f"{PREFIX}{name}" for name in repeated)


@pytest.mark.parametrize(
    "shapes",
    [
        {"m.q.lora_A.weight": (2, 5, 1), "m.q.lora_B.weight": (7, 2)},
        {"m.q.lora_A.weight": (2, 5), "m.q.lora_B.weight": (7, 2, 1)},
        {**PAIR, "m.q.lora_A.bias": (2,)},
        {**PAIR, "m.q.lora_B.bias": (7,), "m.q.base_layer.bias": (7,)},
        {**PAIR, "m.q.lora_magnitude_vector": (7,)},
        {"m.other.lora_A.weight": (2, 5), "m.other.lora_B.weight": (7, 2)},
        {"m.k.lora_A.weight": (2, 5), "m.k.lora_B.weight": (7, 2), "m.k.lora_B.bias": (7,)},  # m.k has no bias
    ],
)
def test_what_has_no_closed_form_is_left_to_peft(tmp_path: Path, shapes: Shapes) -> None:
    recipe = _read(tmp_path, shapes)
    assert (dict(recipe.rules), dict(recipe.stored)) == ({}, {})
    assert recipe.others == tuple(sorted(f"{PREFIX}{name}" for name in shapes))


@pytest.mark.parametrize(
    "config, is_plain",
    [
        ({"use_dora": True}, False),
        ({"use_dora": False}, True),
        ({"alora_invocation_tokens": [1]}, False),
        ({"alora_invocation_tokens": None}, True),
        ({"kasa_config": {"x": 1}}, False),
        ({"init_lora_weights": True}, True),
        ({"init_lora_weights": "gaussian"}, True),
        ({"init_lora_weights": "pissa"}, False),
        ({"peft_type": "LOHA"}, False),
    ],
)
def test_only_plain_lora_has_a_closed_form(tmp_path: Path, config: dict[str, Any], is_plain: bool) -> None:
    recipe = _read(tmp_path, PAIR, **config)
    assert bool(recipe.rules) is is_plain
    assert recipe.others == (() if is_plain else (A, B))


def test_an_extra_tensor_only_concerns_its_own_module(tmp_path: Path) -> None:
    rules = _read(tmp_path, {**PAIR, "m.q2.lora_magnitude_vector": (7,), "x.m.q.extra": (1,)}).rules
    assert dict(rules) == {"m.q.weight": _pair()}


def test_tensors_that_the_model_fuses_have_rules_of_their_own(tmp_path: Path) -> None:
    pair = {"e.0.w.lora_A.weight": (2, 5), "e.0.w.lora_B.weight": (7, 2)}
    recipe = _read(tmp_path, {**PAIR, **pair}, ("e.0.w.weight", "e.1.w.weight"))
    assert recipe.rules.keys() == {"m.q.weight"}
    assert dict(recipe.stored) == {
        "e.0.w.weight": _pair(a=f"{PREFIX}e.0.w.lora_A.weight", b=f"{PREFIX}e.0.w.lora_B.weight")
    }
    assert recipe.others == ()


def test_an_adapter_on_all_that_there_is(tmp_path: Path) -> None:
    _read(tmp_path, PAIR)
    assert read_recipe(tmp_path, ["m.q.weight"]).rules.keys() == {"m.q.weight"}
    assert read_recipe(tmp_path, [], ["m.q.weight"]).stored.keys() == {"m.q.weight"}


@pytest.mark.parametrize("values, is_twin", [((1.0, 1.0), True), ((1.0, 2.0), False)])
def test_tokens_that_both_sides_of_a_tie_train_are_said_once(
    tmp_path: Path, values: tuple[float, float], is_twin: bool
) -> None:
    names = [f"{PREFIX}{side}{TOKENS}" for side in ("embed", "head")]
    tensors = {name: torch.full((3, 4), value) for name, value in zip(names, values, strict=True)}
    save_file({**tensors, "z": torch.zeros(2)}, tmp_path / WEIGHTS_FILE)
    (tmp_path / CONFIG_FILE).write_text('{"peft_type": "LORA"}')
    recipe = read_recipe(tmp_path, MODEL)
    assert recipe.others == (*names, "z")
    assert recipe.redundant == (tuple(names) if is_twin else ())
    save_file({names[0]: tensors[names[0]], "z": torch.zeros(2)}, tmp_path / WEIGHTS_FILE)
    assert read_recipe(tmp_path, MODEL).redundant == ()


@pytest.mark.parametrize(
    "shapes, said",
    [
        ({"m.q.lora_A.weight": (2, 5)}, "but not both halves of that pair"),
        ({"m.q.lora_B.weight": (7, 2)}, "but not both halves of that pair"),
        ({"embed.lora_embedding_A": (2, 9)}, "but not both halves of that pair"),
        ({"embed.lora_embedding_B": (4, 2)}, "but not both halves of that pair"),
        ({"m.q.lora_A.weight": (2, 5), "m.q.lora_B.weight": (7, 3)}, "their ranks differ"),
    ],
)
def test_half_an_adapter_is_refused(tmp_path: Path, shapes: Shapes, said: str) -> None:
    with pytest.raises(BrokenAdapter, match=said):
        _read(tmp_path, shapes)


@pytest.mark.parametrize(
    "config, scaling",
    [
        ({}, 1.0),
        ({"r": 4}, 2.0),
        ({"lora_alpha": 32}, 4.0),
        ({"r": 16, "lora_alpha": 8}, 0.5),
        ({"r": 16, "lora_alpha": 8, "use_rslora": True}, 2.0),
        ({"r": 2, "lora_alpha": 3, "use_rslora": True}, 3 / math.sqrt(2)),
        ({"rank_pattern": {"q_proj": 2}}, 4.0),
        ({"rank_pattern": {"proj": 2}}, 1.0),  # the end of the path, from a dot on
        ({"rank_pattern": {"q_proj": 2, "layers.0.q_proj": 4}}, 4.0),  # the first that matches
        ({"rank_pattern": {"layers.1.q_proj": 2}, "alpha_pattern": {".*0.q_proj": 16}}, 2.0),
        ({"rank_pattern": None, "alpha_pattern": {}}, 1.0),
    ],
)
def test_the_factor_of_a_module(config: dict[str, Any], scaling: float) -> None:
    assert scaling_of("model.layers.0.q_proj", config) == scaling


@pytest.mark.parametrize("text", [None, "[]", "{"])
def test_a_config_that_is_none(tmp_path: Path, text: str | None) -> None:
    save_file({A: torch.ones(2, 5)}, tmp_path / WEIGHTS_FILE)
    if text is not None:
        (tmp_path / CONFIG_FILE).write_text(text)
    with pytest.raises(BrokenAdapter, match=CONFIG_FILE):
        read_recipe(tmp_path, MODEL)


def test_weights_that_are_cut(tmp_path: Path) -> None:
    (tmp_path / CONFIG_FILE).write_text("{}")
    (tmp_path / WEIGHTS_FILE).write_bytes(b"\x08")
    with pytest.raises(BrokenAdapter):
        read_recipe(tmp_path, MODEL)
