"""Several adapters as PEFT holds them, and as PEFT combines them, on a model of the base's class without weights."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.save_and_load import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from torch import nn

from runner.judge.streaming.models import LOAD_ERRORS, first_line, quiet
from runner.protocol.combination import Combination
from runner.protocol.errors import AdapterMismatch

Blocks = list[tuple[torch.Tensor, torch.Tensor]]  # (B, A) in float64, with the delta Σ B·A
_COMBINED = "combined"


def load_parts(model: nn.Module, paths: Sequence[Path]) -> PeftModel:
    """Return all adapters on a model of the base's class whose weights are zeros that take no memory."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(torch.zeros(()).expand(parameter.shape), requires_grad=False)
    peft_model: Any = None
    try:
        with quiet():
            for number, path in enumerate(paths):
                config = PeftConfig.from_pretrained(str(path))
                config.inference_mode = True
                if peft_model is None:
                    peft_model = get_peft_model(model, config, adapter_name=_name(number))
                else:
                    peft_model.add_adapter(_name(number), config)
                weights = {
                    name: tensor
                    for name, tensor in load_peft_weights(str(path), device="cpu").items()
                    if "base_layer" not in name.split(".")  # PEFT's copy of the base beside an embedding's factors
                }
                set_peft_model_state_dict(peft_model, weights, adapter_name=_name(number))
                placed = get_peft_model_state_dict(peft_model, adapter_name=_name(number), save_embedding_layers=False)
                _check_placed(weights, placed)
    except LOAD_ERRORS as error:
        raise _refused("put an adapter on the base", error) from error
    return peft_model


def _check_placed(weights: Mapping[str, torch.Tensor], placed: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in weights.items():
        if name not in placed or not torch.equal(placed[name].double(), tensor.double()):
            raise AdapterMismatch(
                f"PEFT does not hold the adapter tensor {name!r} as it is stored.",
                why="Nothing in the base takes it, or PEFT changed it.",
                fix="Set `base-model` to the model that the adapters were trained on; if it is that already, merge "
                "them one by one.",
            )


def held_parts(peft_model: PeftModel, weights: Sequence[float]) -> Mapping[str, Blocks]:
    """Return what PEFT's own layers hold of the parts, with PEFT's own scalings."""
    made: dict[str, Blocks] = {}
    for path, layer in _layers(peft_model):
        for number, weight in enumerate(weights):
            if (factors := _held(layer, _name(number))) is not None:
                b, a = factors
                made.setdefault(path, []).append((b, weight * layer.scaling[_name(number)] * a))
    return made


def combine_by_peft(peft_model: PeftModel, wanted: Combination) -> Mapping[str, Blocks]:
    """Return the factors that PEFT's `add_weighted_adapter` makes of the parts."""
    tuner: Any = peft_model.base_model
    names = [_name(number) for number in range(len(wanted.weights))]
    for name in names:  # all modules of each, and factors that hold the scaling already
        config: Any = peft_model.peft_config[name]
        mine = [re.escape(path) for path, layer in _layers(peft_model) if _held(layer, name) is not None]
        config.target_modules = "|".join(mine)
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
        config.use_rslora, config.init_lora_weights = False, True
    decompose = tuner._svd_generalized_task_arithmetic_weighted_adapter

    def compact(*args: Any, **options: Any) -> tuple[torch.Tensor, ...]:
        return tuple(factor.clone() for factor in decompose(*args, **options))  # not views of all singular vectors

    tuner._svd_generalized_task_arithmetic_weighted_adapter = compact
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with quiet(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(wanted.seed or 0)
            tuner.add_weighted_adapter(
                names,
                list(wanted.weights),
                _COMBINED,
                combination_type=wanted.kind,
                density=wanted.density,
                majority_sign_method=wanted.majority_sign or "total",
                svd_full_matrices=False,
            )
    except LOAD_ERRORS as error:
        raise _refused("combine the adapters", error) from error
    finally:
        torch.set_num_threads(threads)
    held = ((path, _held(layer, _COMBINED)) for path, layer in _layers(peft_model))
    return {path: [factors] for path, factors in held if factors is not None}


def _name(number: int) -> str:
    return f"part_{number}"  # a bare number would be taken for that of a layer


def _layers(peft_model: PeftModel) -> Iterator[tuple[str, Any]]:
    for path, module in peft_model.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            yield path, module


def _held(layer: Any, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return (B, A) of one adapter on a layer, in float64, or None where it is not on it."""
    if name in layer.lora_A:
        return layer.lora_B[name].weight.detach().double(), layer.lora_A[name].weight.detach().double()
    if name in layer.lora_embedding_A:
        return layer.lora_embedding_B[name].detach().double(), layer.lora_embedding_A[name].detach().double()
    return None


def _refused(what: str, error: BaseException) -> AdapterMismatch:
    return AdapterMismatch(
        f"PEFT cannot {what}: {first_line(error)}",
        why="The adapters were trained on another base, or cannot be combined in this way.",
        fix="Set `base-model` to the model that the adapters were trained on; if it is that already, set another "
        "`combination`.",
    )
