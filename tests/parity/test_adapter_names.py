"""Adapters under other names than PEFT's: merged like the native one, or refused by name; never a silent no-op."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from runner.architecture.names import map_names
from runner.files.layout import INDEX_FILE
from runner.judge.judge import judge
from runner.protocol.errors import AdapterError, AdapterMismatch, UnsupportedAdapter
from runner.protocol.verdict import Status
from runner.worker.merge.prepare import prepare
from tests.parity import models, oracle, structures
from tests.parity.pipeline import run_merge

PREFIX = "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LINEAR = ["q_proj", "v_proj", "down_proj"]
RENAMED = (
    "Qwen2VLForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
    "LlavaForConditionalGeneration",
    "Gemma3ForConditionalGeneration",
)
Rename = Callable[[str], str]


def _lora(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": LINEAR, **options})


def _repack(adapter: Path, out: Path, rename: Rename, **config: Any) -> Path:
    """Return a copy of the adapter whose tensors are renamed and whose config fields are changed."""
    shutil.copytree(adapter, out)
    weights = load_file(adapter / WEIGHTS)
    save_file({rename(name): tensor for name, tensor in weights.items()}, out / WEIGHTS)
    fields = json.loads((adapter / CONFIG).read_text()) | config
    (out / CONFIG).write_text(json.dumps(fields))
    return out


def _old_paths(architecture: str, base: Path) -> dict[str, str]:
    """Return module path in the model → module path as the base's tensors are named, which is the old one."""
    renamed = map_names(structures.build(architecture), oracle.read_folder(base)).renamed
    return {key.rpartition(".")[0]: name.rpartition(".")[0] for key, name in renamed.items()}


def _under_new_names(architecture: str, base: Path, out: Path) -> Path:
    """Return a copy of the base whose tensors are named as the model class names its parameters."""
    shutil.copytree(base, out)
    key_of = {
        name: key for key, name in map_names(structures.build(architecture), oracle.read_folder(base)).renamed.items()
    }
    index = json.loads((out / INDEX_FILE).read_text())
    for file in set(index["weight_map"].values()):
        tensors = load_file(out / file)
        save_file({key_of[name]: tensor for name, tensor in tensors.items()}, out / file, metadata={"format": "pt"})
    index["weight_map"] = {key_of[name]: file for name, file in index["weight_map"].items()}
    (out / INDEX_FILE).write_text(json.dumps(index))
    return out


def _old_name(paths: dict[str, str]) -> Rename:
    def rename(name: str) -> str:
        module, part = re.fullmatch(rf"{re.escape(PREFIX)}(.+?)\.((?:lora_|base_layer).+|weight|bias)", name).groups()  # type: ignore[union-attr]
        return f"{PREFIX}{paths[module]}.{part}"

    return rename


@pytest.mark.parametrize("adapter_names", ["old adapter", "new adapter"])
@pytest.mark.parametrize("base_names", ["old base", "new base"])
@pytest.mark.parametrize("architecture", RENAMED)
def test_a_vision_language_adapter_is_merged_under_either_naming(
    architecture: str, base_names: str, adapter_names: str, tmp_path: Path
) -> None:
    old_base = models.save_base(structures.build(architecture), tmp_path / "old", dtype=torch.bfloat16, shard="30KB")
    native = models.save_adapter(
        old_base, tmp_path / "native", _lora(target_modules="all-linear", bias="lora_only", task_type="CAUSAL_LM")
    )
    paths = _old_paths(architecture, old_base)
    base = old_base if base_names == "old base" else _under_new_names(architecture, old_base, tmp_path / "new")
    old = _repack(native, tmp_path / "adapter", _old_name(paths))
    adapter = old if adapter_names == "old adapter" else native

    plan, merged = run_merge(base, adapter, tmp_path / "merged")

    expected = oracle.saved_merge(old_base, native, tmp_path / "oracle")
    key_of = {f"{old}": new for new, old in paths.items()}
    after, before = oracle.read_folder(merged.root), oracle.read_folder(base)
    for name, tensor in expected.items():
        path, _, leaf = name.rpartition(".")
        stored = name if base_names == "old base" else f"{key_of[path]}.{leaf}".removeprefix(".")
        assert torch.equal(after[stored], tensor.bfloat16()), stored
    assert sum(not torch.equal(after[name], before[name]) for name in before) >= 14
    said = [note for note in plan.summary.notes if "older transformers" in note]
    assert bool(said) == (adapter_names == "old adapter")
    verdict = judge(base=base, adapter=adapter, merged=merged.root, dtype="auto")
    assert verdict.failures == ()
    assert verdict.status is Status.PASS


def test_an_old_vision_language_adapter_that_was_not_applied_is_failed(tmp_path: Path) -> None:
    architecture = "LlavaForConditionalGeneration"
    base = models.save_base(structures.build(architecture), tmp_path / "base", dtype=torch.bfloat16)
    native = models.save_adapter(base, tmp_path / "native", _lora())
    adapter = _repack(native, tmp_path / "adapter", _old_name(_old_paths(architecture, base)))

    verdict = judge(base=base, adapter=adapter, merged=base, dtype="auto")

    assert verdict.status is Status.FAIL


def test_old_paths_in_the_config_are_renamed_with_the_tensors(tmp_path: Path) -> None:
    architecture = "LlavaForConditionalGeneration"
    base = models.save_base(structures.build(architecture), tmp_path / "base", dtype=torch.bfloat16)
    fields = {
        "target_modules": r"model\.language_model\.layers\.\d\.self_attn\.[qv]_proj",
        "rank_pattern": {"model.language_model.layers.0.self_attn.q_proj": 2},
        "alpha_pattern": {"model.language_model.layers.1.self_attn.v_proj": 32},
        "task_type": "FEATURE_EXTRACTION",
        "modules_to_save": ["model.multi_modal_projector.linear_1"],
    }
    native = models.save_adapter(base, tmp_path / "native", _lora(**fields))
    old = json.loads(
        json.dumps(fields)
        .replace("model.language_model", "language_model.model")
        .replace(r"model\\.language_model", r"language_model\\.model")
        .replace("model.multi_modal", "multi_modal")
    )
    adapter = _repack(native, tmp_path / "adapter", _old_name(_old_paths(architecture, base)), **old)

    _, merged = run_merge(base, adapter, tmp_path / "merged")
    _, wanted = run_merge(base, native, tmp_path / "wanted")

    after, expected = oracle.read_folder(merged.root), oracle.read_folder(wanted.root)
    assert all(torch.equal(after[name], expected[name]) for name in expected)
    assert judge(base=base, adapter=adapter, merged=merged.root, dtype="auto").failures == ()


def _with_adapter_name(name: str) -> str:
    return re.sub(r"(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector)(?=\.|$)", r"\1.default", name)


PACKINGS: dict[str, Rename] = {
    "the adapter's name in the keys": _with_adapter_name,
    "another adapter's name in the keys": lambda name: _with_adapter_name(name).replace("default", "my_style.v2"),
    "the prefix doubled": lambda name: PREFIX + name,
    "no prefix": lambda name: name.removeprefix(PREFIX),
    "DDP": lambda name: f"module.{name}",
    "DDP without prefix": lambda name: f"module.{name.removeprefix(PREFIX)}",
    "torch.compile": lambda name: name.replace(PREFIX, f"{PREFIX}_orig_mod."),
    "FSDP": lambda name: f"_fsdp_wrapped_module.{name}".replace(".self_attn", "._fsdp_wrapped_module.self_attn"),
    "activation checkpointing": lambda name: name.replace(".self_attn", "._checkpoint_wrapped_module.self_attn"),
    "the base model without its head": lambda name: name.replace(f"{PREFIX}model.", PREFIX),
    "saved modules by their place in PEFT": lambda name: name.replace("lm_head", "lm_head.modules_to_save.default"),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a base and a native adapter with LoRA, DoRA, an embedding's LoRA and a trained head."""
    root = tmp_path_factory.mktemp("llama")
    base = models.save_base(models.llama(tied=False), root / "base", dtype=torch.bfloat16)
    config = _lora(target_modules=[*LINEAR, "embed_tokens"], modules_to_save=["lm_head"], use_dora=True)
    return base, models.save_adapter(base, root / "adapter", config)


@pytest.mark.parametrize("packing", PACKINGS)
def test_an_adapter_of_another_packing_is_merged_like_the_native_one(
    packing: str, llama: tuple[Path, Path], tmp_path: Path
) -> None:
    base, native = llama
    adapter = _repack(native, tmp_path / "adapter", PACKINGS[packing])

    plan, merged = run_merge(base, adapter, tmp_path / "merged")
    _, wanted = run_merge(base, native, tmp_path / "wanted")

    after, expected = oracle.read_folder(merged.root), oracle.read_folder(wanted.root)
    assert all(torch.equal(after[name], expected[name]) for name in expected)
    assert any(
        "are not named as PEFT names them" in note or "older transformers" in note for note in plan.summary.notes
    )
    verdict = judge(base=base, adapter=adapter, merged=merged.root, dtype="auto")
    assert verdict.failures == ()
    assert verdict.status is Status.PASS


def _add(adapter: Path, out: Path, **tensors: torch.Tensor) -> Path:
    shutil.copytree(adapter, out)
    save_file({**load_file(adapter / WEIGHTS), **tensors}, out / WEIGHTS)
    return out


Q = f"{PREFIX}model.layers.0.self_attn.q_proj"
STRANGE: dict[str, tuple[dict[str, torch.Tensor], type[AdapterError], str]] = {
    "a layer that does not exist": (
        {f"{PREFIX}model.layers.99.self_attn.q_proj.lora_A.weight": torch.ones(4, 48)}, AdapterMismatch, "layers.99",
    ),
    "a module that does not exist": (
        {f"{PREFIX}model.layers.0.cross_attn.q_proj.lora_A.weight": torch.ones(4, 48)}, AdapterMismatch, "cross_attn",
    ),
    "a second adapter": (
        {f"{Q}.lora_A.other.weight": torch.ones(4, 48)}, UnsupportedAdapter, "several adapters",
    ),
    "a tensor twice": (
        {f"{Q.removeprefix(PREFIX)}.lora_A.weight": torch.ones(4, 48)}, AdapterMismatch, "lora_A.weight",
    ),
    "a part that PEFT does not know": ({f"{Q}.lora_C.weight": torch.ones(4, 48)}, AdapterMismatch, "lora_C"),
}  # fmt: skip


@pytest.mark.parametrize("strange", STRANGE)
def test_an_adapter_with_a_tensor_that_has_no_place_is_refused_by_name(
    strange: str, llama: tuple[Path, Path], tmp_path: Path
) -> None:
    base, native = llama
    tensors, error, named = STRANGE[strange]
    adapter = _add(native, tmp_path / "adapter", **tensors)

    with pytest.raises(error, match=re.escape(named)):
        prepare(base, adapter, dtype="auto")


def test_an_adapter_that_lacks_a_tensor_is_refused_by_name(llama: tuple[Path, Path], tmp_path: Path) -> None:
    base, native = llama
    adapter = _repack(native, tmp_path / "adapter", str)
    weights = load_file(native / WEIGHTS)
    del weights[f"{Q}.lora_B.weight"]
    save_file(weights, adapter / WEIGHTS)

    with pytest.raises(AdapterMismatch, match=r"layers\.0\.self_attn\.q_proj\.lora_B"):
        prepare(base, adapter, dtype="auto")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_copy_of_the_base_beside_an_embedding_is_compared_with_the_base(
    dtype: torch.dtype, llama: tuple[Path, Path], tmp_path: Path
) -> None:
    base, native = llama
    name = f"{PREFIX}model.embed_tokens.base_layer.weight"
    copied = load_file(native / WEIGHTS)[name].to(dtype)
    same = _add(native, tmp_path / "same", **{name: copied})
    prepare(base, same, dtype="auto")

    other = copied.clone()
    other[3, 5] += 0.25
    wrong = _add(native, tmp_path / "wrong", **{name: other})
    with pytest.raises(AdapterMismatch, match=r"embed_tokens\.base_layer\.weight"):
        prepare(base, wrong, dtype="auto")


def test_dora_is_read_as_peft_before_0_12_saved_it(llama: tuple[Path, Path], tmp_path: Path) -> None:
    base, native = llama
    old = lambda name: name.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")  # noqa: E731
    adapter = _repack(native, tmp_path / "adapter", old)
    assert any(name.endswith("lora_magnitude_vector") for name in load_file(adapter / WEIGHTS))

    _, merged = run_merge(base, adapter, tmp_path / "merged")
    _, wanted = run_merge(base, native, tmp_path / "wanted")

    after, expected = oracle.read_folder(merged.root), oracle.read_folder(wanted.root)
    assert all(torch.equal(after[name], expected[name]) for name in expected)
    assert judge(base=base, adapter=adapter, merged=merged.root, dtype="auto").status is Status.PASS


def test_fields_of_other_programs_that_mean_nothing_to_a_merge_are_ignored(
    llama: tuple[Path, Path], tmp_path: Path
) -> None:
    base, native = llama
    fields = {
        "lora_dtype": "bfloat16",
        "lorap_emb_lr": 1e-6,
        "lorap_lr_ratio": 16.0,
        "peft_version": "0.9.0",
        "new": None,
    }
    adapter = _repack(native, tmp_path / "adapter", str, **fields)

    prepare(base, adapter, dtype="auto")

    with pytest.raises(UnsupportedAdapter, match="`new`"):
        prepare(base, _repack(native, tmp_path / "other", str, new=1), dtype="auto")
