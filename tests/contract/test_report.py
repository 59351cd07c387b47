from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest

from runner.protocol.digests import FileDigest, MergedCheckpoint
from runner.protocol.errors import Problem, RunnerError
from runner.protocol.plan_summary import PlanSummary
from runner.protocol.verdict import Check, Continuation, Layer, ModuleRow, Outcome, Quality, Status, Verdict
from runner.supervisor.publish import Release
from runner.supervisor.report.files import Report
from tests.contract.test_markdown import Page
from tools.schema import strict

HOSTILE = "a|b\n</details><script>x</script> ![i](https://evil.example) `c` @octocat ::error::x ##[error]x"
PLAN = PlanSummary(
    peft_type="LORA",
    output_dtype="auto",
    tensors_copied=62,
    tensors_cast=0,
    tensors_merged=210,
    tensors_added=0,
    modules=210,
    read_bytes=269_060_552,
    write_bytes=269_060_552,
    disk_bytes=300_000_000,
    peak_memory_bytes=900_000_000,
    judge_memory_bytes=1_700_000_000,
    notes=(HOSTILE,),
)
MERGED = MergedCheckpoint(
    root=Path("/somewhere/secret"),
    files=(FileDigest(path="model.safetensors", size_bytes=1, sha256="a" * 64),),
    tensors_merged=210,
    tensors_copied=62,
    tensors_cast=0,
    read_bytes=1,
    written_bytes=1,
    wall_s=1.5,
)
QUALITY = Quality(
    retention=0.9986,
    effect=0.51,
    effect_error=0.01,
    effect_retention=0.99,
    kl_mean_nats=2.65e-4,
    kl_p99_nats=1e-3,
    kl_base_mean_nats=0.92,
    top1_agreement=0.995,
    nll_base_nats=4.66,
    nll_unmerged_nats=0.13,
    nll_merged_nats=0.131,
    tokens=839,
)
VERDICT = Verdict(
    status=Status.PASS,
    checks=(
        Check(layer=Layer.STRUCTURE, name="the files are complete", outcome=Outcome.PASS),
        Check(layer=Layer.STORAGE, name="correctly rounded", outcome=Outcome.PASS, value=0, limit=0),
        Check(layer=Layer.STORAGE, name="untouched", outcome=Outcome.PASS, value=0, limit=0),
        Check(layer=Layer.SEMANTICS, name="probes", outcome=Outcome.PASS, value=3.8e-13, limit=1e-6),
        Check(layer=Layer.END_TO_END, name="un-rounded", outcome=Outcome.PASS, value=3.1e-6, limit=1e-4),
        Check(layer=Layer.END_TO_END, name="loaded", outcome=Outcome.PASS, value=1e-7, limit=1e-4),
        Check(layer=Layer.END_TO_END, name="power of the prompts", outcome=Outcome.PASS, value=0.5),
    ),
    modules=tuple(
        ModuleRow(name=f"layers.{n}.q_proj", tensor="t", probe_error=n * 1e-13, delta_ratio=0.02, retention=0.99)
        for n in range(8)
    ),
    quality=QUALITY,
    continuations=(Continuation(prompt=HOSTILE, base=HOSTILE, unmerged=HOSTILE, merged=HOSTILE),),
    seed=7,
    wall_s=20.0,
)
RELEASE = Release(repo_id="o/n", tag="v1.0.0", commit="c" * 40, url="https://hub.example/o/n/tree/v1.0.0", created=True)
REPORT = Report(
    inputs_public={
        "adapter-path": "out/adapter",
        "private": True,
        "verify-prompts": 0,
        "report-dir": "lora-merge-report",
    },
    plan=PLAN,
    merged=MERGED,
    verdict=VERDICT,
    release=RELEASE,
    base_revision="b" * 40,
    adapter_digest="d" * 64,
    merged_digest=MERGED.digest,
    phases=(("merge", 12.3), ("verify", 400.0)),
    cache_bytes=(5000, 7),
    versions={"torch": "2.13.0"},
)
PUBLISHED = json.loads((Path(__file__).parents[2] / "docs" / "report.schema.json").read_bytes())
SCHEMA = strict(PUBLISHED)


def test_outputs_of_a_release() -> None:
    assert REPORT.outputs() == {
        "commit-sha": "c" * 40,
        "tag": "v1.0.0",
        "repo-url": "https://hub.example/o/n/tree/v1.0.0",
        "verified": "true",
        "status": "PASS",
        "merged-digest": MERGED.digest,
        "base-revision": "b" * 40,
        "adapter-digest": "d" * 64,
        "pull-request-url": "",
        "report-path": "lora-merge-report/report.json",
        "checksums-path": "",
        "retention": "0.9986",
        "kl-mean-nats": "0.000265",
        "max-probe-error": "7e-13",
        "storage-violations": "0",
        "end-to-end-error": "3.1e-06",
        "effect": "0.51",
        "cache-hit": "false",
        "cache-hit-bytes": "5000",
        "cache-miss-bytes": "7",
    }
    assert replace(REPORT, cache_bytes=(7, 0)).outputs()["cache-hit"] == "true"
    assert replace(REPORT, cache_bytes=None).outputs()["cache-hit"] == ""


def test_outputs_of_a_failure_tell_the_worst() -> None:
    checks = (
        Check(layer=Layer.STORAGE, name="a", outcome=Outcome.FAIL, value=3, limit=0),
        Check(layer=Layer.STORAGE, name="b", outcome=Outcome.FAIL, value=4, limit=0),
        Check(layer=Layer.STORAGE, name="smallest margin", outcome=Outcome.PASS, value=0.4, limit=0.5),
        Check(layer=Layer.END_TO_END, name="c", outcome=Outcome.FAIL, value=math.nan, limit=1e-4),
        Check(layer=Layer.END_TO_END, name="d", outcome=Outcome.PASS, value=2.0, limit=1e-4),
        Check(layer=Layer.END_TO_END, name="e", outcome=Outcome.SKIPPED),
        Check(layer=Layer.STORAGE, name="not judged", outcome=Outcome.SKIPPED, value=9, limit=0),
    )
    verdict = replace(VERDICT, status=Status.FAIL, checks=checks, quality=None)

    outputs = replace(REPORT, verdict=verdict, release=None).outputs()

    assert (outputs["verified"], outputs["status"]) == ("false", "FAIL")
    assert (outputs["storage-violations"], outputs["end-to-end-error"]) == ("7", "nan")
    assert (outputs["retention"], outputs["tag"]) == ("", "")


@pytest.mark.parametrize("status", Status)
def test_only_a_passed_verdict_is_verified(status: Status) -> None:
    outputs = replace(REPORT, verdict=replace(VERDICT, status=status)).outputs()

    assert outputs["verified"] == ("true" if status in (Status.PASS, Status.PASS_LOSSY) else "false")


def test_a_run_that_reached_nothing_has_every_output_too() -> None:
    outputs = Report(inputs_public={}, versions={}).outputs()

    assert outputs.keys() == REPORT.outputs().keys()
    assert {name: value for name, value in outputs.items() if value} == {
        "verified": "skipped",
        "status": "NOT_VERIFIED",
    }


@pytest.mark.parametrize(
    "report", [REPORT, Report(inputs_public={}, versions={}, problems=(Problem(what="w", why="y", fix="f"),))]
)
def test_json_keeps_its_schema(report: Report) -> None:
    jsonschema.validate(json.loads(report.to_json()), SCHEMA)


def test_the_schema_is_one_and_notices_what_is_wrong() -> None:
    jsonschema.Draft202012Validator.check_schema(PUBLISHED)
    report = json.loads(REPORT.to_json())
    jsonschema.validate(report, PUBLISHED)
    bad_parts = ({"status": "MAYBE"}, {"seed": "7"}, {"checks": [{"layer": "storage"}]})
    bad = [report | {"verdict": report["verdict"] | part} for part in bad_parts]
    without = {name: value for name, value in report.items() if name != "problems"}
    for wrong in (*bad, without, report | {"schema_version": 2}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, PUBLISHED)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(json.loads(REPORT.to_json()) | {"novelty": 1}, SCHEMA)
    jsonschema.validate(json.loads(REPORT.to_json()) | {"novelty": 1}, PUBLISHED)


def test_json_holds_no_nan_and_no_path_of_the_machine() -> None:
    checks = tuple(replace(check, value=math.inf) for check in VERDICT.checks)

    text = replace(REPORT, verdict=replace(VERDICT, checks=checks)).to_json()

    def refuse(constant: str) -> None:
        pytest.fail(constant)

    assert json.loads(text, parse_constant=refuse)["verdict"]["checks"][0]["value"] == "inf"
    assert "/somewhere" not in text
    jsonschema.validate(json.loads(text), SCHEMA)


def test_markdown_has_the_verdict_first_and_every_part() -> None:
    text = REPORT.to_markdown()

    assert text.index("Verified") < text.index("Published") < text.index("### Checks") < text.index("### Plan")
    for part in (
        "0.000265",
        "0.92",
        "Worst 5 of 8",
        "3.8e−13",
        "6 min 40 s",
        "2.13.0",
    ):
        assert part in text
    assert text.count("layers.") == 5


def test_the_summary_stays_small_whatever_the_model_and_the_prompts() -> None:
    name = "model.layers.{}.mlp.experts.{}.a_module_with_a_rather_long_name_of_its_own.weight"
    modules = tuple(replace(VERDICT.modules[0], name=name.format(n // 64, n % 64)) for n in range(8000))
    long = "| ünïcode <b> " * 20_000
    check = Check(layer=Layer.STORAGE, name="x", outcome=Outcome.FAIL, detail=long[:2000])
    verdict = replace(
        VERDICT,
        status=Status.FAIL,
        modules=modules,
        checks=(*VERDICT.checks, check),
        continuations=(Continuation(prompt=long, base=long, unmerged=long, merged=long),) * 3,
    )
    problems = tuple(Problem(what=f"w{n}" * 100, why="y" * 300, fix="f" * 300) for n in range(500))
    plan = replace(PLAN, notes=("note " * 40,) * 2000)
    text = replace(REPORT, verdict=verdict, problems=problems, plan=plan).to_markdown(has_files=True)
    assert len(text.encode()) < 100_000
    assert "and 480 more, in report.json" in text
    assert "and 1980 more, in report.json" in text


def test_continuations_stand_side_by_side() -> None:
    answers = Continuation(prompt="Who?", base="It is I.\nMe | you", unmerged="Arr!", merged="Arr!")
    text = replace(REPORT, verdict=replace(VERDICT, continuations=(answers,))).to_markdown()
    assert "| Base | Unmerged | Merged |" in text
    assert "| It is I.<br>Me \\| you | Arr\\! | Arr\\! |" in text
    assert "word for word the same" in text


def test_nothing_in_a_report_breaks_out_of_it() -> None:
    problem = Problem(what=HOSTILE, why=HOSTILE, fix=HOSTILE)
    modules = (replace(VERDICT.modules[0], name=HOSTILE),)
    checks = (Check(layer=Layer.STORAGE, name=HOSTILE, outcome=Outcome.FAIL, detail=HOSTILE),)
    verdict = replace(VERDICT, status=Status.FAIL, modules=modules, checks=checks)
    release = replace(RELEASE, repo_id=HOSTILE, tag=HOSTILE, url="javascript:alert(1)")
    report = replace(
        REPORT,
        verdict=verdict,
        release=release,
        problems=(problem,),
        inputs_public={HOSTILE: HOSTILE},
        versions={HOSTILE: HOSTILE},
        phases=((HOSTILE, 1.0),),
    )

    page = Page(report.to_markdown())

    assert not {"script", "img", "a", "del", "em"} & set(page.tags)
    assert page.tags.count("details") == 5
    assert page.text.count("<script>x</script>") == report.to_markdown().count("script&#62;x")


def test_only_an_address_of_the_web_is_a_link() -> None:
    assert "](<https://hub.example/o/n/tree/v1.0.0>)" in REPORT.to_markdown()
    for url in ("javascript:alert(1)", "https://x> <b>", "file:///etc/passwd", ""):
        assert "](<" not in replace(REPORT, release=replace(RELEASE, url=url)).to_markdown()


def test_an_error_is_told_with_why_and_fix() -> None:
    problems = (Problem(what="First.", why="W1", fix="F1"), Problem(what="Second.", why="W2", fix="F2"))

    text = Report(inputs_public={}, versions={}, problems=problems).to_markdown()

    for word in ("### Problems", "First.", "Why: W1", "Fix: F1", "Second.", "Fix: F2"):
        assert word in text
    assert "Nothing was merged" not in text


def test_writes_both_files_whole(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"

    assert REPORT.write(folder) == folder / "report.json"
    assert REPORT.write(folder).read_text() == REPORT.to_json()
    assert (folder / "report.md").read_text() == REPORT.to_markdown()
    assert sorted(path.name for path in folder.iterdir()) == ["report.json", "report.md"]
    assert (folder / "report.json").stat().st_mode & 0o777 == 0o644


def test_tells_when_the_folder_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(RunnerError, match="report cannot be written") as caught:
        REPORT.write(tmp_path / "file" / "x")
    assert "report-dir" in caught.value.problem.fix
