"""An adapter that names a path or a quantised variant needs `base-model`; what it names is told in the report."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.supervisor.run.conftest import Action


def _naming(adapter: Path, folder: Path, name: str) -> Path:
    copy = Path(shutil.copytree(adapter, folder))
    path = copy / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": name}))
    return copy


@pytest.mark.parametrize("name", ["unsloth/tiny-bnb-4bit", "/home/trainer/tiny"])
def test_a_base_that_cannot_be_followed_has_to_be_given(
    name: str, action: Action, base: Path, adapter: Path, tmp_path: Path
) -> None:
    named = _naming(adapter, tmp_path / "named", name)

    refused = action.run("--adapter-path", str(named), "--mode", "plan")

    assert refused.code == 2, refused.log
    assert "base-model" in refused.report["problems"][0]["fix"]
    assert name in refused.report["problems"][0]["what"]

    planned = action.run("--adapter-path", str(named), "--base-model", str(base), "--mode", "plan")

    assert planned.code == 0, planned.log
    assert any(name in note and "merged into" in note for note in planned.report["plan"]["notes"])
