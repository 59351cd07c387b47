"""The whole action on pickled weights: refused unless allowed, and then released as safetensors only."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.supervisor.run.conftest import TARGET, Action


def _pickled(base: Path, adapter: Path, folder: Path) -> tuple[Path, Path]:
    pickled = shutil.copytree(base, folder / "base")
    tensors: dict[str, torch.Tensor] = {}
    for path in pickled.glob("model*"):
        tensors |= load_file(path) if path.suffix == ".safetensors" else {}
        path.unlink()
    torch.save(tensors, pickled / "pytorch_model.bin")
    trained = shutil.copytree(adapter, folder / "adapter")
    torch.save(load_file(trained / "adapter_model.safetensors"), trained / "adapter_model.bin")
    (trained / "adapter_model.safetensors").unlink()
    return pickled, trained


def test_pickles_are_refused_and_where_allowed_released_as_safetensors(
    action: Action, base: Path, adapter: Path, tmp_path: Path
) -> None:
    pickled_base, pickled_adapter = _pickled(base, adapter, tmp_path)

    refused = action.publish(pickled_base, pickled_adapter)
    done = action.publish(pickled_base, pickled_adapter, "--allow", "pickle")

    assert refused.code == 4, refused.log
    assert "add `pickle` to `allow`" in refused.log
    assert done.code == 0, done.log
    assert done.outputs["status"] == "PASS"
    for noun in ("adapter", "base"):
        assert f"The {noun}'s weights are pickles, and were converted to safetensors first" in done.log
    repo = action.hub.repo(TARGET)
    assert repo is not None
    released = repo.tree("v1.0.0")
    assert "model.safetensors" in released
    assert not [path for path in released if path.endswith((".bin", ".pt"))]


def test_a_plan_converts_pickles_too(action: Action, base: Path, adapter: Path, tmp_path: Path) -> None:
    pickled_base, pickled_adapter = _pickled(base, adapter, tmp_path)

    plan = action.run(
        "--mode",
        "plan",
        "--adapter-path",
        str(pickled_adapter),
        "--base-model",
        str(pickled_base),
        "--allow=pickle",
    )

    assert plan.code == 0, plan.log
    assert any("pickles" in note for note in plan.report["plan"]["notes"]), plan.report["plan"]
