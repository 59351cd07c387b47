"""How a diagnosis is told: in the summary before the checks, and in report.json by its schema."""

from __future__ import annotations

import json
from dataclasses import replace

import jsonschema

from runner.protocol.verdict import Cause, Diagnosis, Status
from tests.contract.test_report import HOSTILE, REPORT, SCHEMA, VERDICT


def test_a_diagnosis_is_told_with_its_evidence_before_the_checks() -> None:
    scale = Diagnosis(
        kind=Cause.SCALE, is_certain=False, evidence="It fits.", tensors=("a.weight",) * 4, count=210, factor=1.0203
    )
    lost = Diagnosis(kind=Cause.FILES, is_certain=True, evidence=HOSTILE)
    failed = replace(REPORT, verdict=replace(VERDICT, status=Status.FAIL, diagnoses=(scale, lost)), release=None)

    text = failed.to_markdown()

    assert "- **wrong scale** (likely): It fits. Estimated factor of the adapter's change: 1.02." in text
    assert "and 207 more" in text
    assert "- **files missing or damaged**:" in text
    assert text.index("### Diagnosis") < text.index("### Checks")
    jsonschema.validate(json.loads(failed.to_json()), SCHEMA)
    assert "### Diagnosis" not in REPORT.to_markdown()
