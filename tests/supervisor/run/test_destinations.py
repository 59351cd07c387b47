"""The whole action to other places than a new repository: early shards, a folder, and a job without a secret."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from tests.hub.identity import IdentityProvider
from tests.hub.server import LocalHub
from tests.parity import models
from tests.supervisor.run.conftest import TARGET, Action


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a base of two shards of more than a megabyte: smaller files are not sent ahead."""
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=704, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base") / "model"
    return models.save_base(transformers.LlamaForCausalLM(config), folder, dtype=torch.bfloat16, shard="2MB")


def test_a_job_without_a_secret_sends_shards_early_and_publishes(
    hub: LocalHub, action: Action, base: Path, adapter: Path, tmp_path: Path
) -> None:
    (tmp_path / "seed").mkdir()
    (tmp_path / "seed" / "notes.md").write_text("mine")
    hub.add_model(TARGET, tmp_path / "seed")
    with IdentityProvider.start("acme/training", ref="refs/tags/v1.0.0") as provider:
        hub.trust(TARGET, provider.issuer, repository="acme/training")
        identity = provider.env() | {"GITHUB_ACTIONS": "", "HF_TOKEN": ""}
        result = action.publish(base, adapter, "--also-tags", "latest", environ=identity)
        assert provider.minted == 2  # for the preflight, and for the push

    assert result.code == 0, result.log
    assert "were sent while the merge went on" in result.log
    repo = hub.repo(TARGET)
    assert repo is not None
    assert repo.tags == dict.fromkeys(("v1.0.0", "latest"), result.outputs["commit-sha"])
    assert "notes.md" in repo.tree("v1.0.0")
    assert "hf_jwt" not in result.log + json.dumps(result.report)
    assert identity["ACTIONS_ID_TOKEN_REQUEST_TOKEN"] not in result.log + json.dumps(result.report)


def test_a_folder_holds_the_same_release_and_loads(
    hub: LocalHub, action: Action, base: Path, adapter: Path, tmp_path: Path
) -> None:
    flags = (
        "--adapter-path", str(adapter), "--base-model", str(base), "--tag", "v1.0.0", "--archive-adapter", "true",
        "--target-repo", f"dir://{tmp_path}/shelf", "--also-tags", "latest",
    )  # fmt: skip
    hub.forget_requests()
    first = action.run(*flags, environ={"HF_TOKEN": ""})
    again = action.run(*flags, environ={"HF_TOKEN": ""})

    assert first.code == again.code == 0, first.log + again.log
    place = tmp_path / "shelf" / "v1.0.0"
    assert first.outputs["repo-url"] == again.outputs["repo-url"] == str(place)
    assert first.outputs["commit-sha"] == ""
    assert "Merge …" not in again.log
    manifest = json.loads((place / "merge-manifest.json").read_text())
    assert manifest["merged_digest"] == first.outputs["merged-digest"] == again.outputs["merged-digest"]
    assert (place / "adapter" / "adapter_config.json").read_bytes() == (adapter / "adapter_config.json").read_bytes()
    assert str(tmp_path) not in (place / "README.md").read_text() + (place / "merge-manifest.json").read_text()
    assert hub.requests() == []
    card = (place / "README.md").read_text()
    assert 'from_pretrained("shelf/v1.0.0")' in card
    assert "cp -r shelf/v1.0.0 model" in card
    checked = subprocess.run(
        ["sha256sum", "--check", "--quiet", "checksums.txt"], cwd=place, capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stderr
    assert "adapter/adapter_model.safetensors" in (place / "checksums.txt").read_text()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "shelf" / "latest")
    assert sum(value.numel() for value in model.parameters()) > 1_000_000
