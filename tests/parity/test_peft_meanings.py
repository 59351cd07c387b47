"""Configs as each release of PEFT wrote them, held against what that release computed (`peft_meanings`)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from runner.files.adapter.eras import era_of, eras_of, parse_version
from runner.files.adapter.meanings import read_config
from runner.protocol.errors import UnsupportedAdapter
from tests.parity.peft_meanings import KINDS, measure

RECORDS = [
    json.loads(line)
    for line in (Path(__file__).parent.parent / "records" / "peft_meanings.jsonl").read_text("utf-8").splitlines()
]
ALL = [
    pytest.param(record["version"], kind, entry, id=f"{record['version']}-{kind}")
    for record in RECORDS
    for kind, entry in record["kinds"].items()
]


def _measured(config: Mapping[str, Any]) -> tuple[dict[str, list[int]], dict[str, Any]]:
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[config["peft_type"]]
    return measure(config_class.from_peft_type(**{**config, "peft_type": config["peft_type"]}))


def _shapes(entry: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(shape) for name, shape in entry["shapes"].items()}


@pytest.mark.parametrize(("version", "kind", "entry"), ALL)
def test_a_reading_gives_what_its_release_computed(version: str, kind: str, entry: Mapping[str, Any]) -> None:
    release = parse_version(version)
    assert release is not None
    era = era_of(release)
    assert era in eras_of(entry["config"])

    if _is_old_series(kind, release):
        with pytest.raises(UnsupportedAdapter, match="num_cayley_neumann_terms"):
            read_config(entry["config"], _shapes(entry), era)
        return
    if entry["config"]["peft_type"] == "OFT" and release < (0, 16):
        return  # other tensors, `oft_r`, which today's PEFT refuses
    edits, _, _ = read_config(entry["config"], _shapes(entry), era)
    shapes, found = _measured({**entry["config"], **edits})

    assert {name: list(shape) for name, shape in shapes.items()} == entry["shapes"]
    for path, value in entry["found"].items():
        torch.testing.assert_close(torch.tensor(found[path]), torch.tensor(value), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("version", "kind", "entry"), ALL)
def test_nothing_is_chosen_where_todays_reading_is_another(version: str, kind: str, entry: Mapping[str, Any]) -> None:
    release = parse_version(version)
    assert release is not None
    if entry["config"]["peft_type"] == "OFT":
        return
    shapes, today = _measured(entry["config"])
    is_same = shapes == entry["shapes"] and all(
        abs(today[path] - value) <= 1e-3 * abs(value) for path, value in entry["found"].items()
    )
    if is_same:
        return
    assert release < (0, 15)
    try:
        edits, told, _ = read_config(entry["config"], _shapes(entry), None)
    except UnsupportedAdapter:
        return
    assert edits, "today's reading was taken, and is another"
    assert "the only PEFT that can have written it" in told


def _is_old_series(kind: str, release: tuple[int, int]) -> bool:
    return kind == "oft, series" and release in ((0, 16), (0, 17))


def test_the_records_hold_every_era_and_every_kind() -> None:
    releases = {parse_version(record["version"]) for record in RECORDS}

    assert {(0, 9), (0, 13), (0, 14), (0, 15), (0, 17), (0, 18)} <= releases
    assert {kind for record in RECORDS for kind in record["kinds"]} == set(KINDS)
