"""Adapters whose expert factors are not packed as the installed PEFT packs them, as folders that are: for PEFT alone.

What each expert's factors are is the judge's own reading (`runner.judge.expected.experts.factors`), expert by expert.
The probes then hold E, computed from the file as it is, against what PEFT computes from this folder.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from runner.judge.expected.experts import (
    ExpertRule,
    SingleRule,
    expert_rules,
    factors,
    single_experts,
    single_pairs,
    wrappers,
)
from runner.judge.expected.recipe import CONFIG_FILE, PREFIX, WEIGHTS_FILE, Recipe, value_of
from runner.judge.expected.unmerged import peft_units
from runner.judge.streaming.models import LOAD_ERRORS, first_line, quiet
from runner.protocol.errors import AdapterMismatch

_SINGLE = re.compile(r".+s\.\d+\.lora_[AB]\.weight")


@contextmanager
def as_peft_packs(recipe: Recipe, empty: Callable[[], PreTrainedModel]) -> Iterator[Path]:
    """Give the adapter's folder, or one that holds the same factors where PEFT looks for them.

    Args:
        recipe: the adapter.
        empty: makes the base's model on the meta device.

    Raises:
        BrokenAdapter, UnsupportedAdapter: nobody can tell how it is packed; see `runner.files.adapter.expert_layout`.
        AdapterMismatch: PEFT cannot put the adapter on the base.
    """
    if any(_SINGLE.fullmatch(name) for name in recipe.others) and (stacks := _stacks(recipe, empty())):
        with tempfile.TemporaryDirectory(prefix="lora-merge-") as made:
            _write_stacks(Path(made), recipe, stacks, empty)
            yield Path(made)
        return
    moved = _moved(recipe, empty) if recipe.config.get("target_parameters") else {}
    if not moved:
        yield recipe.root
        return
    with tempfile.TemporaryDirectory(prefix="lora-merge-") as made:
        folder = Path(made)
        for path in recipe.root.iterdir():
            if path.is_file() and path.name != WEIGHTS_FILE:
                (folder / path.name).symlink_to(path.resolve())
        save_file({**load_file(recipe.root / WEIGHTS_FILE), **moved}, str(folder / WEIGHTS_FILE))
        yield folder


def _moved(recipe: Recipe, empty: Callable[[], PreTrainedModel]) -> dict[str, torch.Tensor]:
    """Return the tensors that are somewhere else for PEFT, by name."""
    model = empty()
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    units = _units(model, recipe.root)
    rules, _ = expert_rules(recipe, units, shapes)
    moved: dict[str, torch.Tensor] = {}
    for path, unit in units.items():
        for parameter, wrapper, _ in wrappers(unit):
            rule = rules.get(f"{path}.{parameter}")
            if isinstance(rule, ExpertRule) and (
                rule.is_grouped or rule.is_transposed == wrapper._did_swap_in_out_features
            ):
                moved[rule.a], moved[rule.b] = _packed(rule, recipe, wrapper)
    return moved


def _units(model: PreTrainedModel, adapter: Path) -> dict[str, nn.Module]:
    """Return the units that PEFT makes of an adapter's config."""
    try:
        with quiet():
            return peft_units(get_peft_model(model, PeftConfig.from_pretrained(str(adapter))))
    except LOAD_ERRORS as error:
        raise AdapterMismatch(
            f"PEFT cannot put the adapter on the base: {first_line(error)}",
            why="Its config names parameters that this base does not have.",
            fix="Set `base-model` to the model that the adapter was trained on; if it is that already, set "
            "`base-revision` to the commit of the training, or save the adapter again.",
        ) from error


def _stacks(recipe: Recipe, model: PreTrainedModel) -> dict[str, dict[int, tuple[str, str]]]:
    """Return key → expert → names of its factors, for the stacks whose experts have a layer each in the adapter."""
    found = {key: single_pairs(recipe, key, tuple(tensor.shape)) for key, tensor in model.state_dict().items()}
    return {key: pairs for key, pairs in found.items() if pairs}


def _write_stacks(
    folder: Path,
    recipe: Recipe,
    stacks: Mapping[str, Mapping[int, tuple[str, str]]],
    empty: Callable[[], PreTrainedModel],
) -> None:
    """Write the adapter as one of the stacks (`target_parameters`), in which PEFT finds the factors of each expert."""
    layers = {f".{key}s.{expert}" for key, pairs in stacks.items() for expert in pairs}
    config = dict(recipe.config)
    wanted = config.get("target_modules")
    if isinstance(wanted, list):
        config["target_modules"] = [
            entry for entry in wanted if not any(layer.endswith(f".{entry}") for layer in layers)
        ]
    config |= {"target_parameters": [*(config.get("target_parameters") or ()), *stacks], "lora_dropout": 0.0}
    for field, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        own = {
            re.escape(key): value_of(config.get(field), f"{key}s.{min(pairs)}", config.get(default, 8))
            for key, pairs in stacks.items()
        }
        config[field] = own | (config.get(field) or {})
    for file in recipe.root.iterdir():
        if file.is_file() and file.name not in (CONFIG_FILE, WEIGHTS_FILE):
            (folder / file.name).symlink_to(file.resolve())
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    model = empty()
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    units = _units(model, folder)
    rules = single_experts(recipe, units, shapes)
    tensors = load_file(recipe.root / WEIGHTS_FILE)
    for path, unit in units.items():
        for parameter, wrapper, depth in wrappers(unit):
            if (rule := rules.get(f"{path}.{parameter}")) is not None:
                under = f"{PREFIX}{path}{'.base_layer' * depth}"
                a, b = _packed(rule, recipe, wrapper)
                tensors |= {f"{under}.lora_A.weight": a, f"{under}.lora_B.weight": b}
    single = {name for rule in rules.values() for pair in rule.pairs.values() for name in pair}
    save_file({name: tensor for name, tensor in tensors.items() if name not in single}, str(folder / WEIGHTS_FILE))


def _packed(rule: ExpertRule | SingleRule, recipe: Recipe, wrapper: Any) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = [], []
    experts = wrapper.num_experts
    rank = next(iter(wrapper.r.values()))
    for expert in range(experts):
        left, right = factors(rule, recipe, expert)
        if isinstance(rule, SingleRule) and expert not in rule.pairs:
            left, right = left.repeat(1, rank), right.repeat(rank, 1)
        own_a, own_b = (right, left) if wrapper._did_swap_in_out_features else (left.T, right.T)
        rows.append(own_a)
        columns.append(own_b)
    b = torch.empty(columns[0].shape[0], columns[0].shape[1] * experts, dtype=columns[0].dtype)
    for expert, own_b in enumerate(columns):
        b[:, expert::experts] = own_b
    return torch.cat(rows).contiguous(), b
