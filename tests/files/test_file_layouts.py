"""Real layouts of bases: every file is carried or told, and the judge's own table asks for nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from runner.files.sidecars.files import find_companions, trace
from runner.files.sidecars.notes import companion_notes
from runner.judge.sidecars.listing import list_folder
from runner.judge.sidecars.names import is_weights, kind_of, module_folders, must_come_along

COMMON = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "LICENSE")
LAYOUTS = {
    "Llama": ("tokenizer.json", "tokenizer.model", "USE_POLICY.md", "original/consolidated.00.pth",
              "original/params.json"),
    "GPT-2": ("vocab.json", "merges.txt", "tokenizer.json", "tf_model.h5", "flax_model.msgpack", "onnx/config.json",
              "rust_model.ot", "64.tflite", "pytorch_model.bin"),
    "T5": ("spiece.model", "tokenizer.json", "added_tokens.json"),
    "Marian": ("source.spm", "target.spm", "vocab.json", "benchmark_results.txt"),
    "Whisper": ("vocab.json", "merges.txt", "normalizer.json", "preprocessor_config.json", "added_tokens.json",
                "model.fp32-00001-of-00002.safetensors", "model.safetensors.index.fp32.json"),
    "VLM": ("chat_template.json", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
            "additional_chat_templates/tool.jinja", "chat_template.jinja", "images/demo.png"),
    "Mistral": ("tekken.json", "params.json", "consolidated.safetensors", "SYSTEM_PROMPT.txt", "tokenizer.model.v3"),
    "sentence-transformers": ("modules.json", "1_Pooling/config.json", "2_Dense/config.json",
                              "2_Dense/model.safetensors",
                              "config_sentence_transformers.json", "sentence_bert_config.json", "vocab.txt",
                              "openvino/openvino_model.xml", "onnx/model.onnx"),
    "remote code": ("modeling_novel.py", "configuration_novel.py", "tokenization_novel.py", "novel.tiktoken",
                    "kernels/__init__.py", "kernels/ops.cu"),
    "MoE": ("bpe.codes", "dict.txt", "gating.json", "model.Q4_K_M.gguf", "checkpoint-7/config.json",
            "adapter_config.json", "adapter_model.safetensors", "training_args.bin", "trainer_state.json"),
}  # fmt: skip
LEFT = {
    "Llama": {"original/consolidated.00.pth", "original/params.json"},
    "GPT-2": {"tf_model.h5", "flax_model.msgpack", "onnx/config.json", "rust_model.ot", "64.tflite",
              "pytorch_model.bin"},
    "Whisper": {"model.fp32-00001-of-00002.safetensors"},
    "Mistral": {"consolidated.safetensors"},
    "sentence-transformers": {"openvino/openvino_model.xml", "onnx/model.onnx"},
    "MoE": {"model.Q4_K_M.gguf", "checkpoint-7/config.json", "adapter_config.json", "adapter_model.safetensors",
            "training_args.bin"},
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_file_is_carried_or_told(layout: str, tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    names = {*COMMON, *LAYOUTS[layout]}
    for name in (*names, "model.safetensors", "README.md", ".gitattributes"):
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text(f'{{"of": "{name}"}}')
    if "modules.json" in names:
        modules = [{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]
        (base / "modules.json").write_text(json.dumps(modules))
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")

    found = find_companions(base, adapter, {})
    origins = trace(base, adapter, found, ["model.safetensors"])

    left = LEFT.get(layout, set())
    assert {companion.path for companion in found} == names - left
    assert set(origins.left_of_base) == left | {"README.md"}
    told = " ".join(companion_notes(base, adapter, origins))
    assert all(name.partition("/")[0] in told for name in left)
    assert "README" not in told
    listing = list_folder(base)
    assert set(must_come_along(listing)) <= names - left
    folders = module_folders(listing)
    assert not [path for path in names - left if is_weights(path) and kind_of(path, folders).name != "MODULE"]
