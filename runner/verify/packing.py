"""Adapters whose expert factors are not packed as the installed PEFT packs them, as folders that are: for PEFT alone.

What each expert's factors are is the judge's own reading (`runner.verify.experts.factors`), expert by expert. The
probes then hold E, computed from the file as it is, against what PEFT computes from this folder.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from runner.errors import AdapterMismatch
from runner.verify.experts import ExpertRule, expert_rules, factors, wrappers
from runner.verify.models import LOAD_ERRORS, first_line, quiet
from runner.verify.recipe import WEIGHTS_FILE, Recipe
from runner.verify.unmerged import peft_units


@contextmanager
def as_peft_packs(recipe: Recipe, empty: Callable[[], PreTrainedModel]) -> Iterator[Path]:
    """Give the adapter's folder, or one that holds the same factors where PEFT looks for them.

    Args:
        recipe: the adapter.
        empty: makes the base's model on the meta device.

    Raises:
        BrokenAdapter, UnsupportedAdapter: nobody can tell how it is packed; see `runner.adapter.expert_layout`.
        AdapterMismatch: PEFT cannot put the adapter on the base.
    """
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
    try:
        with quiet():
            units = peft_units(get_peft_model(model, PeftConfig.from_pretrained(str(recipe.root))))
    except LOAD_ERRORS as error:
        raise AdapterMismatch(
            f"PEFT cannot put the adapter on the base: {first_line(error)}",
            why="Its config names parameters that this base does not have.",
            fix="Set `base-model` to the model that the adapter was trained on.",
        ) from error
    rules, _ = expert_rules(recipe, units, shapes)
    moved: dict[str, torch.Tensor] = {}
    for path, unit in units.items():
        for parameter, wrapper, _ in wrappers(unit):
            rule = rules.get(f"{path}.{parameter}")
            if rule is not None and (rule.is_grouped or rule.is_transposed == wrapper._did_swap_in_out_features):
                moved[rule.a], moved[rule.b] = _packed(rule, recipe, wrapper)
    return moved


def _packed(rule: ExpertRule, recipe: Recipe, wrapper: Any) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = [], []
    for expert in range(rule.experts):
        left, right = factors(rule, recipe, expert)
        own_a, own_b = (right, left) if wrapper._did_swap_in_out_features else (left.T, right.T)
        rows.append(own_a)
        columns.append(own_b)
    b = torch.empty(columns[0].shape[0], columns[0].shape[1] * rule.experts, dtype=columns[0].dtype)
    for expert, own_b in enumerate(columns):
        b[:, expert :: rule.experts] = own_b
    return torch.cat(rows).contiguous(), b
