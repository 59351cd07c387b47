"""The benchmark on a tiny base: the merges are judged, and what fails is never shown as a time."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bench.contestants import OURS, PEFT, Contestant, contestants
from bench.machine import describe
from bench.measure import Limits
from bench.merge import Bench, Case, add, begin, parse, run_case
from bench.reference import compare, write_reference
from bench.report import BEGIN, END, ratios, tables, write_page
from bench.synthetic import ALL_LINEAR, shape_for, write_adapter, write_base

LIMITS = Limits(wall_s=240, anonymous_bytes=4_000_000_000)
SIZE_BYTES = 18_000_000


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One round of a copy, ours, PEFT, and one that fails after it has said a time."""
    fails = "print('{\"after_imports_s\": 0.001}'); raise SystemExit(3)"
    chosen = [one for one in contestants() if one.name in ("cp", OURS, PEFT)]
    chosen.append(Contestant(name="broken", command=(sys.executable, "-c", fails)))
    case = Case(size_gb=SIZE_BYTES / 1e9, rounds=1, peer_rounds=1)
    found = run_case(case, Bench(chosen=chosen, limits=LIMITS), tmp_path_factory.mktemp("bench"))
    document = {"command": "python -m bench.merge", "machine": MACHINE, "cases": [found]}
    again: dict[str, Any] = json.loads(json.dumps(document))
    return again


MACHINE = {
    "cpu": "a processor", "cores": 2, "memory_gb": 24.0, "kernel": "6.1", "commit": "0123abc", "python": "3.11.7",
    "versions": {"torch": "2.13.0"}, "peers": {"mergekit": {"mergekit": "0.1.5"}},
}  # fmt: skip


def test_ours_and_peft_run_and_no_element_differs(measured: dict[str, Any]) -> None:
    results = measured["cases"][0]["results"]

    for name in (OURS, PEFT):
        assert len(results[name]["runs"]) == 1
        assert 0 < results[name]["runs"][0]["after_imports_s"] < results[name]["runs"][0]["wall_s"]
        assert results[name]["difference"]["adapted_elements"] > 0
    assert results[OURS]["difference"]["differing_elements"] == 0
    assert results[OURS]["difference"]["lost"] == results[OURS]["difference"]["spoilt"] == []


def test_one_that_fails_is_reported_as_such_and_not_as_a_time(measured: dict[str, Any]) -> None:
    broken = measured["cases"][0]["results"]["broken"]
    row = next(line for line in tables(measured).splitlines() if line.startswith("| broken"))

    assert broken["runs"] == []
    assert broken["failure"] == "exit code 3"
    assert row == "| broken | exit code 3 | | | | | | | | | |"


def test_ratios_compare_within_one_case(measured: dict[str, Any]) -> None:
    results = measured["cases"][0]["results"]
    times = [results[name]["runs"][0]["wall_s"] for name in (PEFT, OURS)]

    assert f"| {times[0] / times[1]:.2f} |" in ratios(measured)


def test_the_page_is_replaced_between_its_markers_only(measured: dict[str, Any], tmp_path: Path) -> None:
    page = tmp_path / "benchmarks.md"
    page.write_text(f"# Before\n\n{BEGIN}\nold\n{END}\n\nafter\n")

    write_page(page, measured)

    text = page.read_text()
    assert text.startswith(f"# Before\n\n{BEGIN}\n")
    assert text.endswith(f"{END}\n\nafter\n")
    assert "old" not in text
    assert OURS in text
    assert json.loads((tmp_path / "benchmarks.json").read_text()) == measured


def test_a_case_that_runs_again_replaces_the_earlier_one_and_others_stay(measured: dict[str, Any]) -> None:
    document = json.loads(json.dumps(measured))
    larger = measured["cases"][0] | {"base_bytes": 10**12}
    again = measured["cases"][0] | {"layers": 99}

    add(document, larger)
    add(document, again)

    assert [case["base_bytes"] for case in document["cases"]] == [measured["cases"][0]["base_bytes"], 10**12]
    assert document["cases"][0]["layers"] == 99


def test_runs_of_another_machine_are_not_added_to(
    measured: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier = tmp_path / "runs.json"
    monkeypatch.setattr(sys, "argv", ["bench.merge", "--full", "--case", "5", "--add-to", str(earlier)])
    earlier.write_text(json.dumps(measured | {"machine": describe()}))

    document = begin(parse())

    assert document["cases"] == measured["cases"]
    assert document["command"].splitlines()[0] == "python -m bench.merge"
    assert "--full --case 5 --add-to tests/records/benchmarks.json" in document["command"]
    earlier.write_text(json.dumps(measured | {"machine": describe() | {"cpu": "another"}}))
    with pytest.raises(SystemExit, match="not of this machine"):
        begin(parse())


def test_a_page_without_markers_is_left_alone(measured: dict[str, Any], tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Mine\n")

    with pytest.raises(SystemExit, match="needs"):
        write_page(page, measured)

    assert page.read_text() == "# Mine\n"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reference")
    shape = write_base(folder / "base", size_bytes=SIZE_BYTES, shard_bytes=9_000_000)
    write_adapter(folder / "adapter", base=folder / "base", shape=shape, r=4, targets=("q_proj", "v_proj"))
    write_reference(folder / "base", folder / "adapter", folder / "reference")
    return folder


def merged(world: Path, into: Path) -> Path:
    """Write the right merge as a whole folder."""
    into.mkdir()
    for shard in sorted((world / "base").glob("*.safetensors")):
        save_file(load_file(shard) | load_file(world / "reference" / shard.name), into / shard.name)
    return into


def test_the_reference_is_the_fp32_sum_rounded_once(world: Path) -> None:
    name = "model.layers.0.self_attn.q_proj"
    shard = next(path for path in (world / "base").glob("*.safetensors") if f"{name}.weight" in load_file(path))
    with safe_open(world / "adapter" / "adapter_model.safetensors", "pt") as factors:
        a, b = (factors.get_tensor(f"base_model.model.{name}.lora_{letter}.weight").double() for letter in "AB")

    exact = load_file(shard)[f"{name}.weight"].double() + 2.0 * (b @ a)

    rounded = load_file(world / "reference" / shard.name)[f"{name}.weight"].double()
    unit_in_the_last_place = torch.exp2(exact.abs().log2().floor() - 7)
    assert torch.all((rounded - exact).abs() <= unit_in_the_last_place * (0.5 + 2.0**-10))


def test_the_right_merge_differs_nowhere(world: Path, tmp_path: Path) -> None:
    found = compare(world / "base", world / "reference", merged(world, tmp_path / "merged"))

    assert (found.differing_elements, found.lost, found.spoilt, found.dtypes) == (0, (), (), ())
    assert found.adapted_elements > 0


def test_the_base_itself_is_seen_as_a_merge_that_was_not_applied(world: Path) -> None:
    found = compare(world / "base", world / "reference", world / "base")

    assert found.differing_elements > 0.5 * found.adapted_elements


def test_one_element_one_lost_tensor_and_one_spoilt_are_each_seen(world: Path, tmp_path: Path) -> None:
    folder = merged(world, tmp_path / "merged")
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        tensors.pop("model.norm.weight", None)
        if "lm_head.weight" in tensors:
            tensors["lm_head.weight"][0, 0] += 1
        if "model.layers.0.self_attn.v_proj.weight" in tensors:
            tensors["model.layers.0.self_attn.v_proj.weight"][1, 1] += 1
        save_file(tensors, path)

    found = compare(world / "base", world / "reference", folder)

    assert found.differing_elements == 1
    assert found.lost == ("model.norm.weight",)
    assert found.spoilt == ("lm_head.weight",)


@pytest.mark.parametrize("size_gb", [0.02, 0.3, 1, 3, 8])
def test_a_base_has_about_the_size_that_was_asked_for(size_gb: float) -> None:
    stored = sum(2 * torch.Size(shape).numel() for _, shape in shape_for(int(size_gb * 1e9)).tensors)

    assert stored == pytest.approx(size_gb * 1e9, rel=0.06)


def test_every_linear_layer_has_a_name_that_an_adapter_can_target() -> None:
    assert {name.rpartition(".")[2] for name in shape_for(SIZE_BYTES).linear} == set(ALL_LINEAR)


def test_when_the_time_is_up_nobody_else_is_started(tmp_path: Path) -> None:
    copy = next(one for one in contestants() if one.name == "cp")
    case = Case(size_gb=SIZE_BYTES / 1e9, rounds=1, peer_rounds=1)

    found = run_case(case, Bench(chosen=[copy], limits=LIMITS, until=0.0, compare=False), tmp_path)

    assert found["results"]["cp"]["runs"] == []
    assert found["results"]["cp"]["failure"].startswith("did not run")


def test_peers_may_run_in_fewer_rounds(tmp_path: Path) -> None:
    chosen = [one for one in contestants() if one.name in ("cp", "cp, then sha256sum")]
    case = Case(size_gb=SIZE_BYTES / 1e9, rounds=2, peer_rounds=1)

    found = run_case(case, Bench(chosen=chosen, limits=LIMITS, compare=False), tmp_path)

    assert [len(result["runs"]) for result in found["results"].values()] == [2, 1]
