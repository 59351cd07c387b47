"""Every kind of bad merge: how it is made, and what the diagnosis must be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.faults import folders, values, wholes
from bench.faults.scene import Scene, copy_right, patch
from runner.protocol.verdict import Cause

D = Cause


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One kind of bad merge; exactly one of `fault` and `change` makes it.

    Attributes:
        says: one of these must be among the diagnoses.
        allows: these may be among them, too.
        fault: wrong values in the files.
        change: a wrong folder.
        only: names of the adapters for which it exists; all where empty.
        dtypes: that it exists in.
        end_to_end: whether the models must run, too.
    """

    says: tuple[D, ...]
    allows: tuple[D, ...] = ()
    fault: values.Fault | None = None
    change: folders.Change | None = None
    only: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ("auto", "float16", "float32")
    end_to_end: bool = False

    @property
    def is_wide(self) -> bool:
        """Whether it changes most tensors, which takes a hundred times as long to write and to judge."""
        return self.fault is not None and self.fault.__name__ not in _SMALL

    def make(self, scene: Scene, folder: Path) -> bool:
        """Write the bad merge into `folder`; return whether it differs from the right one at all."""
        if self.fault is not None:
            return patch(scene, folder, self.fault(scene))
        copy_right(scene, folder)
        if self.change is not None:
            self.change(scene, folder)
        return True


def _values(fault: values.Fault, *says: D, allows: tuple[D, ...] = (), only: tuple[str, ...] = ()) -> Kind:
    return Kind(says=says, fault=fault, allows=allows, only=only)


def _change(
    change: folders.Change, *says: D, allows: tuple[D, ...] = (), only: tuple[str, ...] = (), end_to_end: bool = False
) -> Kind:
    return Kind(says=says, change=change, allows=allows, only=only, end_to_end=end_to_end)


SAVED = ("saved",)
_SMALL = frozenset(
    "rows_skipped one_scaled tensors_swapped rows_swapped rows_permuted rare_rows_shifted embedding_rolled zeroed_rows "
    "plant flip several_bits saved_ignored head_is_embedding embedding_is_head added_rows_random skip".split()
)
KINDS: Mapping[str, Kind] = {
    "adapter not applied": _values(values.not_applied, D.NOT_APPLIED, allows=(D.SAVED_IGNORED,)),
    "change × 1.02": _values(values.times(1.02), D.SCALE),
    "change × 1.1": _values(values.times(1.1), D.SCALE),
    "change × 0.5 (alpha not read)": _values(values.times(0.5), D.SCALE, D.RSLORA_AS_LORA),
    "change × 0.98": _values(values.times(0.98), D.SCALE),
    "applied twice": _values(values.times(2.0), D.TWICE, D.LORA_AS_RSLORA),
    "applied twice, rounded between": _values(values.twice_rounded_between, D.TWICE, D.LORA_AS_RSLORA),
    "subtracted": _values(values.times(-1.0), D.SIGN),
    "rsLoRA read as LoRA, or the reverse": _values(
        values.wrong_scaling_rule, D.RSLORA_AS_LORA, D.LORA_AS_RSLORA, D.TWICE
    ),
    "one tensor skipped": _values(values.skipped(values.main_tensor), D.MODULES_SKIPPED),
    "one layer skipped": _values(values.skipped(values.main_layer), D.MODULES_SKIPPED),
    "all modules of one name skipped": _values(values.skipped(values.main_type), D.MODULES_SKIPPED),
    "half of the layers skipped": _values(values.skipped(values.later_half), D.MODULES_SKIPPED),
    "half of a tensor's rows skipped": _values(values.rows_skipped, D.ROWS_SKIPPED),
    "one tensor's change × 1.1": _values(values.one_scaled, D.SCALE),
    "change rounded to bf16 first": _values(values.change_through(torch.bfloat16), D.ROUNDED_TWICE),
    "change rounded to fp16 first": _values(values.change_through(torch.float16), D.ROUNDED_TWICE),
    "sum rounded to another 16-bit format first": _values(values.sum_through, D.ROUNDED_TWICE),
    "factors, change and sum in bf16 (PEFT without autocast)": _values(values.factors_through_bf16, D.ROUNDED_TWICE),
    # In float32 this is less than what two right computations differ by.
    "cut towards zero": Kind(says=(D.TRUNCATED,), fault=values.truncated, dtypes=("auto", "float16")),
    "square changes transposed": _values(values.transposed, D.TRANSPOSED),
    "two layers' tensors swapped": _values(values.tensors_swapped, D.SWAPPED),
    "layers shifted by one": _values(values.layers_shifted, D.SWAPPED),
    "changes shifted by one layer": _values(values.changes_shifted, D.OTHER_ADAPTER),
    "another adapter": _values(values.other_adapter, D.OTHER_ADAPTER),
    "two rows swapped": _values(values.rows_swapped, D.ROWS_MOVED),
    "rows permuted": _values(values.rows_permuted, D.ROWS_MOVED),
    "50 rare rows of the embedding shifted": _values(values.rare_rows_shifted, D.ROWS_MOVED),
    "embedding shifted by one row": _values(values.embedding_rolled, D.ROWS_MOVED),
    "a tensor zeroed": _values(values.zeroed(1.0), D.ZEROED),
    "a tenth of a tensor's rows zeroed": _values(values.zeroed(0.1), D.ZEROED),
    "a NaN": _values(values.planted(float("nan")), D.NON_FINITE),
    "an infinity": _values(values.planted(float("inf")), D.NON_FINITE),
    "a bit of a fraction flipped": _values(values.flipped("fraction"), D.BIT_FLIP),
    "a bit of an exponent flipped": _values(values.flipped("exponent"), D.BIT_FLIP),
    "the top bit of an exponent flipped": _values(values.flipped("top"), D.BIT_FLIP, D.NON_FINITE),
    "a sign flipped": _values(values.flipped("sign"), D.BIT_FLIP),
    "the last bit of an untouched element flipped": _values(values.flipped("last", touched=False), D.BIT_FLIP),
    "three elements overwritten": _values(values.several_bits, D.FEW_ELEMENTS, D.BIT_FLIP),
    "int8 base": _values(values.quantised("int8"), D.QUANTISED_BASE),
    "int4 base": _values(values.quantised("int4 rounding in groups of 64"), D.QUANTISED_BASE),
    "NF4 base": _values(values.quantised("NF4"), D.QUANTISED_BASE),
    "fp8 base": _values(values.quantised("fp8"), D.QUANTISED_BASE),
    "sum rounded to int8": _values(values.quantised("int8", adds=False), D.QUANTISED_BASE),
    "another base, 0.1 σ away": _values(values.other_base(0.1), D.WRONG_BASE),
    "another base, 0.01 σ away": _values(values.other_base(0.01), D.WRONG_BASE),
    "another base, 0.001 σ away": _values(values.other_base(0.001), D.WRONG_BASE),
    "DoRA's magnitude ignored": _values(wholes.magnitude_ignored, D.MAGNITUDE_IGNORED, only=("dora",)),
    "saved modules ignored": _values(wholes.saved_ignored, D.SAVED_IGNORED, only=SAVED),
    "head := embedding": _values(wholes.head_is_embedding, D.HEAD_IS_EMBEDDING, only=SAVED),
    "embedding := head": _values(wholes.embedding_is_head, D.HEAD_IS_EMBEDDING, only=SAVED),
    "rows of added tokens not trained": _values(wholes.added_rows_random, D.ADDED_ROWS, only=SAVED),
    "trained head lost": _change(folders.head_lost, D.HEAD_LOST, allows=(D.TIE_FLAG,), only=SAVED, end_to_end=True),
    "base's tokenizer with added tokens": _change(
        folders.tokenizer_of_the_base, D.TOKENIZER, allows=(D.CHAT_TEMPLATE,), only=SAVED
    ),
    "a shard missing": _change(folders.missing_shard, D.FILES),
    "a shard cut": _change(folders.truncated_shard, D.FILES),
    "a header damaged": _change(folders.damaged_header, D.FILES),
    "a tensor missing": _change(folders.tensor_missing, D.TENSOR_MISSING),
    "a layer missing": _change(folders.layer_missing, D.TENSOR_MISSING),
    "a tensor too many": _change(folders.tensor_extra, D.TENSOR_EXTRA),
    "an adapter's factor stored": _change(folders.adapter_stored, D.TENSOR_EXTRA),
    "a tensor under the adapter's name": _change(
        folders.tensor_renamed, D.TENSOR_MISSING, allows=(D.TENSOR_EXTRA,), end_to_end=True
    ),
    "one tensor in another dtype": _change(folders.other_dtype, D.DTYPE),
    "all tensors in another dtype": _change(folders.all_other_dtype, D.DTYPE, allows=(D.CONFIG,)),
    "embedding cut by eight rows": _change(folders.embedding_cut, D.SHAPE),
    "index with a wrong total": _change(folders.index_total, D.INDEX),
    "tie flag wrong": _change(folders.tie_flag, D.TIE_FLAG, end_to_end=True),
    "rotary base wrong": _change(folders.rope, D.CONFIG, end_to_end=True),
    "epsilon of the norms wrong": _change(folders.set_config(rms_norm_eps=1e-3), D.CONFIG, end_to_end=True),
    "quantisation config left in": _change(
        folders.set_config(quantization_config={"load_in_4bit": True, "quant_method": "bitsandbytes"}), D.CONFIG
    ),
    "chat template wrong": _change(folders.chat_template, D.CHAT_TEMPLATE, D.TOKENIZER, end_to_end=True),
    "vocabulary wrong": _change(folders.tokenizer_words, D.TOKENIZER),
    "tokenizer missing": _change(folders.tokenizer_missing, D.TOKENIZER),
    "generation config wrong": _change(folders.generation_config, D.GENERATION_CONFIG),
    "adapter left in the folder": _change(folders.adapter_left_in, D.STRAY_WEIGHTS),
    "other weights in the folder": _change(folders.second_weights, D.STRAY_WEIGHTS),
}
