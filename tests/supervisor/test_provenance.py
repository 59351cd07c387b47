"""The input digest and the manifest: equal inputs give equal bytes, and every input that counts is counted."""

from __future__ import annotations

import json
import math
import socket
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from runner.protocol.combination import Combination
from runner.protocol.digests import FileDigest, FileOrigins, digest_of
from runner.protocol.rounding import Rounding
from runner.protocol.verdict import Check, Layer, Outcome, Quality, Status
from runner.supervisor.documents.provenance import (
    AdapterOrigin,
    adapter_digest,
    base_digest,
    manifest,
    quality_numbers,
    rounded,
)
from tests.supervisor.publish.world import FACTS, origin, verdict

FILES = (
    FileDigest(path="model.safetensors", size_bytes=10, sha256="b" * 64),
    FileDigest(path="config.json", size_bytes=2, sha256="a" * 64),
    FileDigest(path="README.md", size_bytes=3, sha256="c" * 64),
    FileDigest(path="merge-manifest.json", size_bytes=3, sha256="d" * 64),
)
QUALITY = Quality(
    retention=0.99987654,
    effect=0.123456,
    effect_error=0.00123456,
    effect_retention=0.99,
    kl_mean_nats=1.23456e-5,
    kl_p99_nats=math.nan,
    kl_base_mean_nats=0.5,
    top1_agreement=0.987654,
    nll_base_nats=3.21987,
    nll_unmerged_nats=2.1,
    nll_merged_nats=2.1,
    tokens=512,
)


SEVERAL = replace(
    origin(),
    more_adapters=(AdapterOrigin(repo_id="o/second", commit="2" * 40, digest="3" * 64),),
    combination=Combination(kind="dare_ties", weights=(1.0, -0.5), density=0.5, seed=1, majority_sign="total"),
)


@pytest.mark.parametrize("field", [field.name for field in fields(origin())])
def test_every_field_of_the_origin_changes_the_input_digest(field: str) -> None:
    others: dict[str, Any] = {
        "more_adapters": (),
        "combination": Combination(kind="cat", weights=(1.0, -0.5)),
        "rounding": Rounding(kind="stochastic", seed=0),
    }
    other = others.get(field, "other")

    assert replace(SEVERAL, **{field: other}).input_digest() != SEVERAL.input_digest() != origin().input_digest()


@pytest.mark.parametrize(
    "change",
    [{"weights": (1.0, 0.5)}, {"density": 0.6}, {"seed": 2}, {"majority_sign": "frequency"}, {"kind": "dare_linear"}],
)
def test_every_part_of_the_combination_changes_the_input_digest(change: dict[str, Any]) -> None:
    assert SEVERAL.combination is not None
    other = replace(SEVERAL, combination=replace(SEVERAL.combination, **change))

    assert other.input_digest() != SEVERAL.input_digest()


def test_the_manifest_names_every_adapter_with_its_weight() -> None:
    document = json.loads(manifest(SEVERAL, FACTS, verdict(), FILES))

    assert [adapter["weight"] for adapter in document["adapters"]] == [1.0, -0.5]
    assert document["adapters"][0]["digest"] == document["adapter"]["digest"] == SEVERAL.adapter_digest
    assert document["adapters"][1] == {"repo_id": "o/second", "commit": "2" * 40, "digest": "3" * 64, "weight": -0.5}
    assert document["adapters_digest"] == SEVERAL.digest_of_adapters
    assert document["combination"] == {
        "kind": "dare_ties", "density": 0.5, "seed": 1, "majority_sign": "total",
    }  # fmt: skip
    assert "combination" not in json.loads(manifest(origin(), FACTS, verdict(), FILES))


def test_the_input_digest_is_stable() -> None:
    # This number is in the tags of releases: a change here makes every rerun an error "made from other inputs".
    assert origin().input_digest() == "2e54e2a481325091aa237d81e3bcbc6b9eae56e9906d96a13a38658d2f7d6086"


def test_the_manifest_is_the_same_whatever_the_order_time_and_machine() -> None:
    first = manifest(origin(), FACTS, verdict(), FILES)
    again = manifest(origin(), FACTS, replace(verdict(), wall_s=99.0), FILES[::-1])
    assert first == again
    assert socket.gethostname().encode() not in first


def test_measured_numbers_that_differ_in_the_last_digits_give_the_same_manifest() -> None:
    first = manifest(origin(), FACTS, verdict(value=1.2345678e-7), FILES)
    assert first == manifest(origin(), FACTS, verdict(value=1.2345679e-7), FILES)


def test_the_manifest_lists_the_files_but_not_itself_and_the_card() -> None:
    document = json.loads(manifest(origin(), FACTS, replace(verdict(), quality=QUALITY), FILES))
    assert [file["path"] for file in document["files"]] == ["config.json", "model.safetensors"]
    assert document["merged_digest"] == digest_of(FILES[:2])
    assert document["input_digest"] == origin().input_digest()
    assert document["verdict"]["status"] == "PASS"
    assert document["verdict"]["quality"]["retention"] == 0.9999
    assert document["verdict"]["quality"]["kl_p99_nats"] is None
    assert document["versions"] == {"lora-merge-action": "0.1.0", "torch": "2.13.0"}


def test_texts_of_the_verdict_stay_out_because_they_may_name_local_paths() -> None:
    check = Check(layer=Layer.STRUCTURE, name="claim", outcome=Outcome.WARN, detail="/home/me/model", value=math.inf)
    found = manifest(origin(), FACTS, replace(verdict(Status.PASS_LOSSY), checks=(check,)), FILES)
    assert b"/home/me" not in found
    assert b"Infinity" not in found


@pytest.mark.parametrize(
    "value, wanted", [(None, None), (math.nan, None), (math.inf, None), (0.0, 0.0), (0.012345, 0.012), (1234.0, 1200.0)]
)
def test_numbers_are_rounded_to_two_digits(value: float | None, wanted: float | None) -> None:
    assert rounded(value) == wanted


def test_no_quality_is_none() -> None:
    assert quality_numbers(None) is None


def make_adapter(root: Path) -> Path:
    root.mkdir()
    (root / "adapter_config.json").write_text("{}")
    (root / "adapter_model.safetensors").write_bytes(b"weights")
    (root / "tokenizer.json").write_text("{}")
    (root / "README.md").write_text("hello")
    return root


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "tokenizer.json"])
def test_the_adapter_digest_counts_what_is_merged(tmp_path: Path, name: str) -> None:
    root = make_adapter(tmp_path / "adapter")
    before = adapter_digest(root)
    (root / name).write_bytes(b"changed")
    assert adapter_digest(root) != before


def test_the_adapter_digest_does_not_count_what_is_not_merged(tmp_path: Path) -> None:
    root = make_adapter(tmp_path / "adapter")
    before = adapter_digest(root)
    (root / "README.md").write_text("changed")
    (root / "optimizer.pt").write_bytes(b"state")
    (root / "checkpoint-5").mkdir()
    (root / "checkpoint-5" / "adapter_model.safetensors").write_bytes(b"old")
    assert adapter_digest(root) == before
    assert adapter_digest(make_adapter(tmp_path / "elsewhere")) == before


def test_the_base_digest_counts_weights_and_companions_and_no_other_format(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    before = base_digest(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "x.json").write_text("{}")
    (tmp_path / "README.md").write_text("hello")
    assert base_digest(tmp_path) == before
    (tmp_path / "model.safetensors").write_bytes(b"other")
    assert base_digest(tmp_path) != before


def test_the_manifest_names_whose_bytes_each_file_has() -> None:
    origins = FileOrigins(
        base=("config.json",),
        adapter=("chat_template.jinja",),
        edited={"config.json": ("dtype",)},
        left_of_base=("README.md", "onnx/model.onnx"),
        left_of_adapter=("optimizer.pt",),
    )
    files = [
        FileDigest(path=path, size_bytes=1, sha256="a" * 64)
        for path in ("chat_template.jinja", "config.json", "model.safetensors")
    ]

    document = json.loads(manifest(origin(), replace(FACTS, origins=origins), verdict(), files))

    assert document["origins"] == {
        "base": ["config.json"],
        "adapter": ["chat_template.jinja"],
        "edited": {"config.json": ["dtype"]},
        "written": ["model.safetensors"],
        "left_out": {"base": ["README.md", "onnx/model.onnx"], "adapter": ["optimizer.pt"]},
    }
