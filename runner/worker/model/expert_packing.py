"""Expert factors that were packed in another layout, as the installed PEFT packs them: the same numbers elsewhere.

Nothing is computed, so nothing is rounded: blocks change places, and where the two factors were the other way round,
Bᵀ is what A was and Aᵀ what B was. `runner.files.adapter.expert_layout` says which layout a file has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper

from runner.files.adapter.expert_layout import Layout, Pair, read_layout
from runner.worker.model.heads import PREFIX


def as_peft_packs(
    peft_model: PeftModel, config: Mapping[str, Any], weights: Mapping[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """Return the adapter's tensors as PEFT reads them, and what to say about it.

    Args:
        peft_model: with an empty adapter.
        config: adapter_config.json.
        weights: the adapter's tensors under PEFT's names; those that stay are not copied.

    Raises:
        BrokenAdapter, UnsupportedAdapter: see `read_layout`.
    """
    wrappers = _wrappers(peft_model, weights)
    if not wrappers:
        return dict(weights), ()
    pairs = {path: _pair(wrapper, path, weights) for path, wrapper in wrappers.items()}
    layout = read_layout(config, list(pairs.values()))
    repacked = dict(weights)
    for path, pair in pairs.items():
        a, b = _names(path)
        if layout.is_grouped or layout.is_direct == pair.is_in_out:
            repacked[a], repacked[b] = _repack(weights[a], weights[b], pair, layout)
    return repacked, _notes(layout, next(iter(pairs.values())))


def _wrappers(peft_model: PeftModel, weights: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    return {
        path: module
        for path, module in peft_model.get_base_model().named_modules()
        if isinstance(module, ParamWrapper)
        and module.get_param().ndim == 3
        and all(name in weights for name in _names(path))
    }


def _names(path: str) -> tuple[str, str]:
    return f"{PREFIX}{path}.lora_A.weight", f"{PREFIX}{path}.lora_B.weight"


def _pair(wrapper: Any, path: str, weights: Mapping[str, torch.Tensor]) -> Pair:
    a, b = _names(path)
    return Pair(
        name=a,
        a=tuple(weights[a].shape),
        b=tuple(weights[b].shape),
        stack=tuple(wrapper.get_param().shape),
        is_in_out=not wrapper._did_swap_in_out_features,
    )


def _repack(a: torch.Tensor, b: torch.Tensor, pair: Pair, layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
    experts, rank = pair.stack[0], pair.rank
    of_a = a.reshape(experts, rank, -1)
    of_b = b.reshape(-1, experts, rank).transpose(1, 2) if layout.is_grouped else b.reshape(-1, rank, experts)
    of_b = of_b.permute(2, 0, 1)  # (experts, outer, rank)
    if layout.is_direct == pair.is_in_out:
        of_a, of_b = of_b.transpose(1, 2), of_a.transpose(1, 2)
    return (
        of_a.reshape(experts * rank, -1).contiguous(),
        of_b.permute(1, 2, 0).reshape(-1, experts * rank).contiguous(),
    )


def _notes(layout: Layout, pair: Pair) -> tuple[str, ...]:
    notes = []
    if layout.is_grouped:
        notes.append("The columns of the expert factors are grouped by expert, as the adapter says; PEFT mixes them.")
    if layout.is_direct == pair.is_in_out:
        notes.append("The two expert factors are the other way round, as PEFT before 0.19.1 (or for a class of another "
                     "transformers) wrote them.")  # fmt: skip
    return tuple(notes)
