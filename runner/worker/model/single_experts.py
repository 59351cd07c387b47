"""Adapters with a layer for each expert (`gate_up_projs.0`, …), for a class that stacks its experts (`gate_up_proj`).

gpt-oss in 4 bits has one linear layer for each expert, its 16-bit form one parameter for all. The layer i of the one is
the matrix i of the other, so W[i] takes s·B_i·A_i, or its transpose where the class stores its experts as (in, out).
PEFT merges that as an adapter of the parameter (`target_parameters`): this room says which, and puts the factors of
all experts where PEFT looks for them. Nothing is computed; an expert that the training left alone has zeros.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from runner.protocol.errors import AdapterMismatch, UnsupportedAdapter
from runner.worker.model.heads import PREFIX

_FACTOR = re.compile(rf"{re.escape(PREFIX)}(?P<key>.+)s\.(?P<expert>\d+)\.lora_(?P<half>[AB])\.weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class Single:
    """The layers of one stack of experts.

    Attributes:
        key: of the stack in the model's state dict, for example "model.layers.0.mlp.experts.gate_up_proj".
        shape: (experts, rows, columns) of the stack.
        experts: those that the adapter has layers of.
    """

    key: str
    shape: tuple[int, ...]
    experts: tuple[int, ...]

    def layer(self, expert: int) -> str:
        """Return the path that an expert's layer has in the adapter."""
        return f"{self.key}s.{expert}"

    def name(self, expert: int, half: str) -> str:
        """Return the name of an expert's factor "A" or "B"."""
        return f"{PREFIX}{self.layer(expert)}.lora_{half}.weight"


def find_single_experts(shapes: Mapping[str, tuple[int, ...]], names: Iterable[str]) -> tuple[Single, ...]:
    """Return the stacks whose experts the adapter names one by one.

    Args:
        shapes: of the model's state dict, by key.
        names: of the adapter's tensors, as PEFT would name them.
    """
    found: dict[str, set[int]] = {}
    for name in names:
        match = _FACTOR.fullmatch(name)
        shape = shapes.get(match["key"], ()) if match else ()
        if match and len(shape) == 3 and int(match["expert"]) < shape[0]:
            found.setdefault(match["key"], set()).add(int(match["expert"]))
    return tuple(Single(key=key, shape=shapes[key], experts=tuple(sorted(found[key]))) for key in sorted(found))


def target_stacks(config: LoraConfig, stacks: Iterable[Single], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Have the config target the stacks, where it targets their layers.

    Raises:
        AdapterMismatch: the config targets a layer that the adapter does not have.
        UnsupportedAdapter: the experts of one stack are scaled differently.
    """
    stacks = tuple(stacks)
    layers = {stack.layer(expert) for stack in stacks for expert in stack.experts}
    endings = tuple({f".{stack.key.rpartition('.')[2]}" for stack in stacks})
    for key, shape in shapes.items():
        if len(shape) == 3 and key.endswith(endings):
            _check_all_there(config, [f"{key}s.{expert}" for expert in range(shape[0])], layers)
    ranks, alphas = {}, {}
    for stack in stacks:
        ranks[re.escape(stack.key)] = _only("ranks", config.r, config.rank_pattern, stack)
        alphas[re.escape(stack.key)] = _only("alphas", config.lora_alpha, config.alpha_pattern, stack)
    config.rank_pattern, config.alpha_pattern = ranks | config.rank_pattern, alphas | config.alpha_pattern
    if isinstance(config.target_modules, set):  # "0" would be taken for a layer of the model
        config.target_modules = {
            entry for entry in config.target_modules if not any(f".{layer}".endswith(f".{entry}") for layer in layers)
        }
    config.target_parameters = [*(config.target_parameters or ()), *(stack.key for stack in stacks)]
    config.lora_dropout = 0.0  # only trainings use it, and PEFT has none for parameters


def pack_single_experts(
    peft_model: PeftModel, weights: Mapping[str, torch.Tensor], stacks: Iterable[Single]
) -> dict[str, torch.Tensor]:
    """Return the adapter's tensors with the factors of each stack packed as PEFT reads them.

    Args:
        peft_model: with an empty adapter of `target_stacks`.
        weights: the adapter's tensors under PEFT's names.
        stacks: of `find_single_experts`.

    Raises:
        AdapterMismatch: half of a pair is missing, or a factor has another shape than this base's experts.
    """
    packed = dict(weights)
    places = {
        f"{path.replace('.base_layer', '')}.{module.parameter_name}": (path, module)
        for path, module in peft_model.get_base_model().named_modules()
        if isinstance(module, ParamWrapper)
    }
    for stack in stacks:
        path, wrapper = places[stack.key]
        a, b = (f"{PREFIX}{path}.lora_{half}.weight" for half in "AB")
        packed[a], packed[b] = _pack(stack, wrapper, packed)
    return packed


def describe(stacks: tuple[Single, ...]) -> tuple[str, ...]:
    """Return what to say of them."""
    if not stacks:
        return ()
    return (
        f"The adapter has a layer for each expert, the first {stacks[0].layer(stacks[0].experts[0])!r}; the base "
        f"stacks its experts, and the matrix of each takes what its layer learnt ({len(stacks)} stacks).",
    )


def _pack(stack: Single, wrapper: Any, weights: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    experts, rank = stack.shape[0], next(iter(wrapper.r.values()))
    wanted = {"A": (rank, wrapper.in_features), "B": (wrapper.out_features, rank)}
    halves: dict[str, list[torch.Tensor]] = {}
    for half, shape in wanted.items():
        own = {expert: weights.pop(stack.name(expert, half), None) for expert in stack.experts}
        for expert, tensor in own.items():
            if tensor is None or tuple(tensor.shape) != shape:
                raise _misfit(stack.name(expert, half), tensor, shape)
        given = {expert: tensor for expert, tensor in own.items() if tensor is not None}
        empty = torch.zeros(shape, dtype=next(iter(given.values())).dtype)
        halves[half] = [given.get(expert, empty) for expert in range(experts)]
    # PEFT's packing: A one expert below the other, the columns of B with the expert running fastest.
    return torch.cat(halves["A"]), torch.stack(halves["B"], dim=2).flatten(1)


def _check_all_there(config: LoraConfig, paths: list[str], layers: set[str]) -> None:
    for path in paths:
        if path not in layers and check_target_module_exists(config, path):
            raise AdapterMismatch(
                f"The adapter has no tensor for {path!r}, which its config targets.",
                why="Other experts have theirs: the file was not saved, or not copied, as a whole.",
                fix="Save the adapter again as a whole.",
            )


def _only(what: str, default: float, patterns: Mapping[str, float], stack: Single) -> Any:
    found = {patterns.get(get_pattern_key(patterns.keys(), stack.layer(expert)), default) for expert in stack.experts}
    if len(found) > 1:
        raise UnsupportedAdapter(
            f"The experts of {stack.key!r} have different {what}: {min(found):g} to {max(found):g}.",
            why="The base stacks them in one parameter, for which PEFT knows one.",
            fix="Release the adapter unmerged, or train all experts alike.",
        )
    return found.pop()


def _misfit(name: str, tensor: torch.Tensor | None, shape: tuple[int, ...]) -> AdapterMismatch:
    if tensor is None:
        what = f"The adapter has no tensor {name!r}."
    else:
        what = f"The adapter's {name!r} is {list(tensor.shape)}, and this base's experts need {list(shape)}."
    return AdapterMismatch(
        what,
        why="The adapter was trained on another base, or was not saved as a whole.",
        fix="Set `base-model` to the model that the adapter was trained on, in 16 bits; if it is that already, save "
        "the adapter again.",
    )
