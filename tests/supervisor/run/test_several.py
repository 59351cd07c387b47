"""Several adapters through the whole action: plan, publish, verify, and what is refused before any work."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from runner.protocol.combination import Several
from tests.hub.server import LocalHub
from tests.parity import models, oracle
from tests.parity.several import combination, peft_combination
from tests.supervisor.run.conftest import TARGET, Action


@pytest.fixture(scope="module")
def second(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return models.save_adapter(base, tmp_path_factory.mktemp("second") / "lora", config, seed=11)


@pytest.fixture
def remote(hub: LocalHub, second: Path) -> str:
    """Return `owner/name` of the second adapter on the Hub."""
    name = "alice/second"
    if hub.repo(name) is None:
        hub.add_model(name, second)
    return name


def _released(action: Action, folder: Path, tag: str = "v1.0.0") -> Path:
    repo = action.hub.repo(TARGET)
    assert repo is not None
    folder.mkdir()
    for path in repo.tree(tag):
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_bytes(repo.read(path, tag))
    return folder


def test_two_adapters_are_planned_published_and_judged_again(
    action: Action, base: Path, adapter: Path, second: Path, remote: str, tmp_path: Path
) -> None:
    lines = f"{adapter}\n{remote} -0.5"
    flags = ("--combination", "dare_ties", "--combination-density", "0.7", "--combination-seed", "9")

    planned = action.run("--mode", "plan", "--adapter-path", lines, "--base-model", str(base), *flags)
    first = action.run(
        "--adapter-path", lines, "--base-model", str(base), "--target-repo", TARGET, "--tag", "v1.0.0", *flags
    )
    again = action.run(
        "--adapter-path", lines, "--base-model", str(base), "--target-repo", TARGET, "--tag", "v1.0.0", *flags
    )

    assert planned.code == 0, planned.log
    assert planned.report["plan"]["tensors_merged"] == 6
    assert "2 adapters are combined first: dare_ties (density 0.7, seed 9, majority sign by total)" in planned.log
    assert first.code == 0, first.log
    assert first.outputs["verified"] == "true"
    assert again.code == 0, again.log
    assert "nothing to do" in again.log

    merged = _released(action, tmp_path / "released")
    wanted = combination("dare_ties", 1.0, -0.5, seed=9, density=0.7)
    expected = peft_combination(base, Several(paths=(adapter, second), combination=wanted))
    for name, tensor in oracle.read_folder(merged).items():
        assert torch.equal(tensor, expected[name].to(tensor.dtype)), name

    repo = action.hub.repo(remote)
    assert repo is not None
    manifest = json.loads((merged / "merge-manifest.json").read_text())
    assert [found["weight"] for found in manifest["adapters"]] == [1.0, -0.5]
    assert manifest["adapters"][1]["commit"] == repo.branches["main"]
    assert manifest["adapters"][1]["repo_id"] == remote
    assert manifest["combination"] == {"kind": "dare_ties", "density": 0.7, "seed": 9, "majority_sign": "total"}
    assert manifest["adapters_digest"] == first.outputs["adapter-digest"]
    assert remote in (merged / "README.md").read_text()
    assert first.report["inputs"]["adapter-path"].splitlines()[1] == f"{remote} -0.5"

    verify = ("--mode", "verify", "--adapter-path", lines, "--base-model", str(base), "--merged-path", str(merged))
    good = action.run(*verify, *flags)
    bad = action.run(*verify, *flags[:-1], "10")
    assert good.code == 0, good.log
    assert good.outputs["verified"] == "true"
    assert bad.code == 8, bad.log
    assert bad.outputs["status"] == "FAIL"


def test_another_weight_under_the_same_tag_is_other_content(
    action: Action, base: Path, adapter: Path, second: Path
) -> None:
    flags = ("--base-model", str(base), "--target-repo", "alice/weights", "--tag", "v1", "--combination", "cat")

    first = action.run("--adapter-path", f"{adapter}\n{second}", *flags)
    other = action.run("--adapter-path", f"{adapter}\n{second} 0.9", *flags)

    assert first.code == 0, first.log
    assert other.code == 3, other.log


def test_several_adapters_without_a_combination_stop_before_any_work(
    action: Action, base: Path, adapter: Path, second: Path
) -> None:
    result = action.publish(base, adapter, "--adapter-path=x")  # given twice
    refused = action.run("--mode", "plan", "--adapter-path", f"{adapter}\n{second}", "--base-model", str(base))

    assert result.code == 2
    assert refused.code == 2, refused.log
    assert "`combination` is missing" in refused.log
    assert "magnitude_prune_svd" in refused.log


def test_what_a_combination_would_drop_stops_before_the_base_is_read(
    action: Action, adapter: Path, base: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(adapter, tmp_path / "other")
    config = json.loads((other / "adapter_config.json").read_text()) | {"modules_to_save": ["lm_head"]}
    (other / "adapter_config.json").write_text(json.dumps(config))

    result = action.run(
        "--mode", "plan", "--adapter-path", f"{adapter}\n{other}", "--combination", "cat",
        "--base-model", "alice/no-such-base",
    )  # fmt: skip

    assert "alice/no-such-base" not in result.log.split("error")[0]
    assert result.code == 4, result.log
    assert "Adapter 2 sets `modules_to_save`" in result.log
