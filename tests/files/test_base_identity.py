"""The base that an adapter names is followed only where nothing has to be guessed."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType

import pytest

from runner.files.adapter.base_identity import departures, is_quantised, named_base
from runner.files.adapter.folder import Adapter
from runner.protocol.errors import InputError
from runner.protocol.repo_ref import RepoRef

QUANTISED = (
    "unsloth/llama-3-8b-bnb-4bit",
    "unsloth/Qwen2.5-7B-Instruct-unsloth-bnb-4bit",
    "TheBloke/Llama-2-7B-GPTQ",
    "casperhansen/llama-3-8b-instruct-awq",
    "neuralmagic/Meta-Llama-3.1-8B-Instruct-FP8",
    "neuralmagic/Meta-Llama-3.1-8B-Instruct-FP8-dynamic",
    "someone/model-int4",
    "mlx-community/Qwen2.5-7B-4bit",
    "someone/model.w4a16",
)
WHOLE = (
    "meta-llama/Llama-3.1-8B",
    "Qwen/Qwen3-4B-Instruct-2507",
    "microsoft/phi-4",
    "mistralai/Mistral-7B-v0.1",
    "someone/awqward",
    "google/gemma-3-4b-it",
)
PATHS = ("/home/trainer/models/llama", "./base", "../base", "C:\\models\\llama", "~/llama", "llama")


def _adapter(name: str | None, **config: object) -> Adapter:
    return Adapter(
        root=Path("adapter"), config=MappingProxyType(config), peft_type="LORA", task_type=None, base_model=name,
        tensors={},
    )  # fmt: skip


def test_a_repository_is_followed_at_the_users_revision_else_at_the_adapters() -> None:
    assert named_base(_adapter("a/b"), None) == RepoRef(repo_id="a/b")
    assert named_base(_adapter("a/b", revision="v1"), None) == RepoRef(repo_id="a/b", revision="v1")
    assert named_base(_adapter("a/b", revision="v1"), "v2") == RepoRef(repo_id="a/b", revision="v2")


@pytest.mark.parametrize("name", QUANTISED)
def test_a_quantised_variant_is_not_followed(name: str) -> None:
    with pytest.raises(InputError) as caught:
        named_base(_adapter(name), None)

    (problem,) = caught.value.problems
    assert name in problem.what
    assert "`base-model`" in problem.fix
    assert "16-bit" in problem.fix


@pytest.mark.parametrize("name", WHOLE)
def test_a_model_that_is_not_quantised_is_not_taken_for_one(name: str) -> None:
    assert not is_quantised(name)
    assert named_base(_adapter(name), None).repo_id == name


@pytest.mark.parametrize("name", [*PATHS, None])
def test_a_path_or_nothing_is_not_followed(name: str | None) -> None:
    with pytest.raises(InputError) as caught:
        named_base(_adapter(name), None)

    assert "`base-model`" in caught.value.problems[0].fix


def test_the_model_of_a_cached_copy_is_told_and_not_followed() -> None:
    path = "/root/.cache/huggingface/hub/models--meta-llama--Llama-3.1-8B/snapshots/0123abcd"

    with pytest.raises(InputError) as caught:
        named_base(_adapter(path), None)

    assert "meta-llama/Llama-3.1-8B" in caught.value.problems[0].fix


def test_another_base_than_the_adapters_is_told() -> None:
    base = RepoRef(repo_id="new/name", revision="0" * 40)

    assert departures([_adapter("new/name"), _adapter(None)], base) == ()
    (note,) = departures([_adapter("old/name"), _adapter("old/name")], base)
    assert "'old/name'" in note
    assert "new/name" in note
    (note,) = departures([_adapter("unsloth/x-bnb-4bit")], RepoRef(path=Path("/models/x")))
    assert "local folder" in note
    assert "quantised weights" in note
    assert len(departures([_adapter("a/b"), _adapter("/c")], base)) == 2
