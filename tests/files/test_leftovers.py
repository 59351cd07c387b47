"""What lies beside an adapter: what a training leaves is left, and what may be a part of the model is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from runner.files.layout import build_header
from runner.files.sidecars.leftovers import check_leftovers
from runner.protocol.errors import UnsupportedAdapter

ADAPTER = {"adapter_config.json": "{}", "adapter_model.safetensors": "w"}
DENSE = {"modules.json": json.dumps([{"path": ""}, {"path": "2_Dense"}]), "2_Dense/config.json": "{}"}


def _write(folder: Path, *names: str, **files: str) -> Path:
    for name, text in (ADAPTER | dict.fromkeys(names, "w") | files).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize(
    "name",
    [
        "non_lora_trainables.bin", "trainable_params.bin", "new_embeddings.safetensors", "mm_projector.bin",
        "embeddings.pt", "extra.npz", "pytorch_model.bin", "model.safetensors", "2_Dense/model.safetensors",
        "2_Dense/pytorch_model.bin", "prompt_embeddings.npy", "pytorch_model.bin.index.json",
    ],
)  # fmt: skip
def test_trained_state_beside_the_adapter_is_refused_by_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedAdapter, match=name):
        check_leftovers(_write(tmp_path, name), ("value-head", "pickle"))
    (tmp_path / name).unlink()  # the way out that the error names
    check_leftovers(tmp_path, ())


def test_a_value_head_is_refused_unless_it_is_allowed(tmp_path: Path) -> None:
    folder = _write(tmp_path, "value_head.safetensors", "v_head.bin")
    with pytest.raises(UnsupportedAdapter, match=r"v_head\.bin, value_head\.safetensors.* is a value head") as caught:
        check_leftovers(folder, ())
    assert "`value-head` to `allow`" in caught.value.problem.fix
    check_leftovers(folder, ("value-head",))
    (folder / "non_lora_trainables.bin").write_text("w")
    with pytest.raises(UnsupportedAdapter, match=r"non_lora_trainables\.bin, v_head\.bin, value_head\.safetensors"):
        check_leftovers(folder, ("value-head",))


def _write_tensors(path: Path, *names: str) -> None:
    path.write_bytes(build_header([(name, "F32", (1,)) for name in names], {}) + bytes(4 * len(names)))


@pytest.mark.parametrize("prefix", ["v_head.summary", "value_head", "pretrained_model.v_head.summary"])
@pytest.mark.parametrize("file", ["model.safetensors", "head.safetensors"])
def test_a_value_head_is_known_by_its_tensors(file: str, prefix: str, tmp_path: Path) -> None:
    folder = _write(tmp_path)
    _write_tensors(folder / file, f"{prefix}.weight", f"{prefix}.bias")
    with pytest.raises(UnsupportedAdapter, match=rf"{file}, beside the adapter, is a value head"):
        check_leftovers(folder, ())
    check_leftovers(folder, ("value-head",))


@pytest.mark.parametrize("others", [("embed_tokens.weight",), ("prev_head.weight",), ("v_heads.weight",)])
def test_a_value_head_among_other_tensors_is_refused(others: tuple[str, ...], tmp_path: Path) -> None:
    folder = _write(tmp_path)
    _write_tensors(folder / "head.safetensors", "v_head.summary.weight", *others)
    with pytest.raises(UnsupportedAdapter, match=r"head\.safetensors, beside the adapter, may hold what was trained"):
        check_leftovers(folder, ("value-head",))


def test_what_a_training_leaves_behind_is_no_obstacle(tmp_path: Path) -> None:
    check_leftovers(
        _write(
            tmp_path, "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth", "rng_state_0.pth", "README.md",
            "training_args.bin", "trainer_state.json", "runs/x/events.out.tfevents.1.host.2.0", "adapter_model.bin",
            "checkpoint-10/adapter_model.safetensors", "checkpoint-10/optimizer.pt", "global_step5/mp_rank_00.pt",
            "reference/adapter_config.json", "reference/adapter_model.safetensors", "merged.Q4_K_M.gguf",
            "random_states_0.pkl", ".cache/x.bin", "code.py",
        ),
        (),
    )  # fmt: skip


def test_a_whole_model_beside_the_adapter_is_left_there(tmp_path: Path) -> None:
    names = ("config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
    check_leftovers(_write(tmp_path, *names), ())


def test_a_pickled_module_of_the_adapter_needs_to_be_allowed(tmp_path: Path) -> None:
    folder = _write(tmp_path, "2_Dense/pytorch_model.bin", **DENSE)
    with pytest.raises(UnsupportedAdapter, match=r"2_Dense/pytorch_model\.bin of the adapter is a pickle"):
        check_leftovers(folder, ())
    check_leftovers(folder, ("pickle",))
    (folder / "2_Dense/model.safetensors").write_text("w")
    check_leftovers(folder, ())
