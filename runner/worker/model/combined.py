"""Several LoRA adapters on one model, made one by PEFT's own `add_weighted_adapter`; afterwards there is only that one.

Needs the factors alone, no weight of the base. Four things that PEFT's call gets wrong, or leaves to chance, are set
right around it, and nothing in it is changed:

- it lets the new adapter inherit `use_rslora`, although the factors then hold the scaling already: the result would be
  too large by the square root of the rank;
- it lets it inherit the first adapter's exclusions and layers, so that modules of the others would get lost: here the
  modules are named one by one;
- it makes the new factors in the base's dtype, into which `cat` would round them: here they are float32;
- dare draws from torch's global generator: here it is seeded just before, and left as it was.

Singular vectors are computed in the reduced form (`svd_full_matrices=False`): the same vectors up to the last bits
(measured: 2e-7 of the largest value), without a square matrix of the vocabulary's size.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from runner.protocol.combination import Combination
from runner.protocol.errors import AdapterMismatch


def combine(peft_model: PeftModel, combination: Combination, *, into: str) -> None:
    """Replace all adapters of `peft_model` by their combination, named `into`, active and frozen.

    Args:
        peft_model: holds the LoRA adapters in the order of the weights.
        combination: how.
        into: a name that none of them has.

    Raises:
        AdapterMismatch: PEFT cannot combine these.
    """
    parts = list(peft_model.peft_config)
    tuner: Any = peft_model.base_model
    for name in parts:
        peft_model.peft_config[name] = dataclasses.replace(
            peft_model.peft_config[name],
            target_modules=_exactly(tuner, name),
            exclude_modules=None,
            layers_to_transform=None,
            layers_pattern=None,
            use_rslora=False,
            init_lora_weights=True,
        )
    try:
        with _deterministic(combination.seed), _in_float32(tuner), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tuner.add_weighted_adapter(
                adapters=parts,
                weights=list(combination.weights),
                adapter_name=into,
                combination_type=combination.kind,
                svd_full_matrices=False,
                density=combination.density,
                majority_sign_method=combination.majority_sign or "total",
            )
            peft_model.set_adapter(into, inference_mode=True)
            for name in parts:
                peft_model.delete_adapter(name)
    except (ValueError, TypeError, RuntimeError, IndexError) as error:
        raise AdapterMismatch(
            f"PEFT cannot combine the adapters: {str(error).strip()[:300]}",
            why=f"The kind of combination is `{combination.kind}`.",
            fix="Set another `combination`, such as `cat`, or release one merge for each adapter.",
        ) from error
    peft_model.eval()


def _exactly(tuner: Any, name: str) -> str:
    """Return the regular expression that matches the modules of this adapter, and no other."""
    paths = [
        path
        for path, module in tuner.model.named_modules()
        if isinstance(module, LoraLayer) and (name in module.lora_A or name in module.lora_embedding_A)
    ]
    return "|".join(map(re.escape, paths))


@contextmanager
def _deterministic(seed: int | None) -> Iterator[None]:
    """One thread and a seeded generator: the same factors on every number of cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed or 0)
            yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _in_float32(tuner: Any) -> Iterator[None]:
    """Let PEFT make new factors in float32 whatever the base's dtype, and keep no more of an SVD than the factors."""
    inject = tuner.inject_adapter
    decompose = tuner._svd_generalized_task_arithmetic_weighted_adapter

    def inject_float32(model: Any, name: str, *rest: Any, **options: Any) -> None:
        inject(model, name, *rest, **options)
        tuner._cast_adapter_dtype(adapter_name=name, autocast_adapter_dtype=True)

    def decompose_compact(*args: Any, **options: Any) -> tuple[torch.Tensor, ...]:
        return tuple(factor.clone() for factor in decompose(*args, **options))  # views would keep all singular vectors

    replacements: dict[str, Callable[..., Any]] = {
        "inject_adapter": inject_float32,
        "_svd_generalized_task_arithmetic_weighted_adapter": decompose_compact,
    }
    for name, function in replacements.items():
        setattr(tuner, name, function)
    try:
        yield
    finally:
        for name in replacements:
            delattr(tuner, name)
