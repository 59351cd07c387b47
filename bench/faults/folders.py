"""Wrong folders: files, headers, configuration and tokenizer of a copy of the right merge are changed in place."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.faults.scene import Scene, rewrite
from runner.files.layout import INDEX_FILE, read_checkpoint
from tests.judge.merges import edit_config

Change = Callable[[Scene, Path], None]


def _last_shard(folder: Path) -> Path:
    return folder / read_checkpoint(folder).files[-1].name


def missing_shard(scene: Scene, folder: Path) -> None:
    """One shard is not there."""
    _last_shard(folder).unlink()


def _own(path: Path) -> bytes:
    """Return a shard's bytes, its hard link undone."""
    data = path.read_bytes()
    path.unlink()
    return data


def truncated_shard(scene: Scene, folder: Path) -> None:
    """One shard ends early."""
    path = _last_shard(folder)
    path.write_bytes(_own(path)[:-4096])


def damaged_header(scene: Scene, folder: Path) -> None:
    """The header of one shard is overwritten."""
    path = _last_shard(folder)
    data = _own(path)
    path.write_bytes(data[:8] + b"\0" * 64 + data[72:])


def tensor_missing(scene: Scene, folder: Path) -> None:
    """One tensor is in no shard."""
    name = scene.main
    rewrite(folder, read_checkpoint(folder).tensors[name].file, lambda tensors: tensors.pop(name))


def layer_missing(scene: Scene, folder: Path) -> None:
    """One layer is in no shard."""
    prefix = scene.main[: scene.main.index("layers.") + 8].rstrip(".") + "."
    for file in {info.file for name, info in read_checkpoint(folder).tensors.items() if name.startswith(prefix)}:
        rewrite(folder, file, lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith(prefix)])


def tensor_extra(scene: Scene, folder: Path) -> None:
    """A tensor is stored that the base does not have."""
    file = read_checkpoint(folder).files[-1].name
    rewrite(folder, file, lambda tensors: tensors.update({"model.surplus.weight": torch.zeros(3)}))


def adapter_stored(scene: Scene, folder: Path) -> None:
    """The factors of one module are stored beside the merged weights."""
    file = read_checkpoint(folder).files[-1].name
    name = scene.main.replace(".weight", ".lora_A.weight")
    rewrite(folder, file, lambda tensors: tensors.update({name: torch.zeros(2, 3)}))


def tensor_renamed(scene: Scene, folder: Path) -> None:
    """One tensor is stored as the model with the adapter names it."""
    name = scene.main
    wrong = name.replace(".weight", ".base_layer.weight")
    file = read_checkpoint(folder).tensors[name].file
    rewrite(folder, file, lambda tensors: tensors.update({wrong: tensors.pop(name)}))


def other_dtype(scene: Scene, folder: Path) -> None:
    """One tensor is stored in another dtype."""
    name = scene.main
    info = read_checkpoint(folder).tensors[name]
    wrong = torch.float16 if info.dtype != "F16" else torch.bfloat16
    rewrite(folder, info.file, lambda tensors: tensors.update({name: tensors[name].to(wrong)}))


def all_other_dtype(scene: Scene, folder: Path) -> None:
    """Everything is stored in another dtype, and config.json says so."""
    wrong = "float16" if scene.output != "F16" else "bfloat16"
    target = torch.float16 if wrong == "float16" else torch.bfloat16

    def cast(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: value.to(target) for name, value in tensors.items()})

    for file in read_checkpoint(folder).files:
        rewrite(folder, file.name, cast)
    edit_config(folder, dtype=wrong)


def embedding_cut(scene: Scene, folder: Path) -> None:
    """The embedding lost its last eight rows."""
    name = "model.embed_tokens.weight"
    file = read_checkpoint(folder).tensors[name].file
    rewrite(folder, file, lambda tensors: tensors.update({name: tensors[name][:-8]}))


def head_lost(scene: Scene, folder: Path) -> None:
    """The trained head is not stored, and the config ties again."""
    file = read_checkpoint(folder).tensors["lm_head.weight"].file
    rewrite(folder, file, lambda tensors: tensors.pop("lm_head.weight"))
    edit_config(folder, tie_word_embeddings=True)


def index_total(scene: Scene, folder: Path) -> None:
    """The index announces another size."""
    path = folder / INDEX_FILE
    index = json.loads(path.read_bytes())
    index["metadata"]["total_size"] += 8
    path.write_text(json.dumps(index))


def tie_flag(scene: Scene, folder: Path) -> None:
    """The tie flag says the opposite."""
    edit_config(folder, tie_word_embeddings=not _config(folder)["tie_word_embeddings"])


def rope(scene: Scene, folder: Path) -> None:
    """The base of the rotary positions is another one."""
    config = _config(folder)
    key = "rope_parameters" if "rope_parameters" in config else "rope_theta"
    wrong: Any = {**config[key], "rope_theta": 5000.0} if isinstance(config[key], dict) else 5000.0
    edit_config(folder, **{key: wrong})


def set_config(**fields: Any) -> Change:
    """Fields of config.json have other values."""

    def change(scene: Scene, folder: Path) -> None:
        edit_config(folder, **fields)

    return change


def chat_template(scene: Scene, folder: Path) -> None:
    """The chat template is another one."""
    (folder / "chat_template.jinja").write_text("{{ messages }}")


def tokenizer_words(scene: Scene, folder: Path) -> None:
    """Two words of the vocabulary change places."""
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_bytes())
    words = tokenizer["model"]["vocab"]
    first, second = sorted(words, key=words.__getitem__)[-2:]
    words[first], words[second] = words[second], words[first]
    path.write_text(json.dumps(tokenizer))


def tokenizer_missing(scene: Scene, folder: Path) -> None:
    """There is no tokenizer."""
    for path in folder.glob("tokenizer*"):
        path.unlink()


def tokenizer_of_the_base(scene: Scene, folder: Path) -> None:
    """The tokenizer does not know the tokens that the adapter adds."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)
        if (scene.base / name).is_file():
            shutil.copyfile(scene.base / name, folder / name)
    for path in folder.glob("added_tokens.json"):
        path.unlink()


def adapter_left_in(scene: Scene, folder: Path) -> None:
    """The adapter lies beside the weights, so that transformers applies it once more."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(scene.adapter / name, folder / name)


def second_weights(scene: Scene, folder: Path) -> None:
    """A second set of weights lies in the folder."""
    (folder / "pytorch_model.bin").write_bytes(b"PK")


def generation_config(scene: Scene, folder: Path) -> None:
    """The generation config stops at another token."""
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), "eos_token_id": 0}))


def _config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_bytes())
    return config
