"""The whole run as one noun: report.json, report.md and the outputs of the action. No torch, no network.

Everything in it may be shown: no token, and no path of the machine except those that the user gave.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from runner.protocol.digests import MergedCheckpoint
from runner.protocol.errors import Problem, RunnerError, disk_full
from runner.protocol.plan_summary import PlanSummary
from runner.protocol.verdict import PASSED, Check, Layer, Outcome, Status, Verdict
from runner.supervisor.documents.canvas import Picture
from runner.supervisor.documents.pictures import picture_files
from runner.supervisor.documents.provenance import CHECKSUMS
from runner.supervisor.owner import give, owner_of
from runner.supervisor.report import summary
from runner.supervisor.report.summary import Published

SCHEMA_VERSION = 1
JSON_FILE = "report.json"
MARKDOWN_FILE = "report.md"


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What was asked, done, found and published; parts that the run did not reach are None or empty.

    Attributes:
        inputs_public: see `runner.supervisor.inputs.read.Inputs.public`.
        plan: what was to be done.
        merged: what was written.
        verdict: what the judge found.
        pictures: of the verdict.
        release: what is on the Hub.
        base_revision: commit of the base, 40 hex digits; None for a local folder.
        adapter_digest: of the adapter's files, 64 hex digits.
        merged_digest: of the merged files, 64 hex digits.
        problems: why the run ended early.
        phases: (name, seconds) in their order.
        versions: library → version.
        checksums: `checksums.txt` of the release; None where there is none.
        cache_bytes: of what came from the Hub, (found in the cache, downloaded); None where nothing was asked for.
    """

    inputs_public: Mapping[str, str | bool | int]
    plan: PlanSummary | None = None
    merged: MergedCheckpoint | None = None
    verdict: Verdict | None = None
    pictures: tuple[Picture, ...] = ()
    release: Published | None = None
    base_revision: str | None = None
    adapter_digest: str | None = None
    merged_digest: str | None = None
    problems: tuple[Problem, ...] = ()
    phases: tuple[tuple[str, float], ...] = ()
    versions: Mapping[str, str]
    checksums: bytes | None = None
    cache_bytes: tuple[int, int] | None = None

    def outputs(self) -> dict[str, str]:
        """Return every output of `action.yml`; "" where the run did not reach it. Numbers are written with `repr`."""
        release, verdict = self.release, self.verdict
        status = verdict.status if verdict else release.status if release else None
        quality = verdict.quality if verdict else None
        folder = str(self.inputs_public.get("report-dir", ""))
        return {
            "commit-sha": release.commit if release and not release.pull_request else "",
            "tag": release.tag if release else "",
            "repo-url": release.url if release else "",
            "verified": "skipped" if status is None else str(status in PASSED).lower(),
            "status": (status or Status.NOT_VERIFIED).value,
            "merged-digest": self.merged_digest or (release.merged_digest if release else None) or "",
            "base-revision": self.base_revision or "",
            "adapter-digest": self.adapter_digest or "",
            "pull-request-url": (release.pull_request or "") if release else "",
            "report-path": f"{folder.rstrip('/')}/{JSON_FILE}" if folder else "",
            "checksums-path": f"{folder.rstrip('/')}/{CHECKSUMS}" if folder and self.checksums else "",
            "retention": _text(quality.retention if quality else None),
            "kl-mean-nats": _text(quality.kl_mean_nats if quality else None),
            "max-probe-error": _text(self._max_probe_error()),
            "storage-violations": _text(self._storage_violations()),
            "end-to-end-error": _text(self._end_to_end_error()),
            "effect": _text(quality.effect if quality else None),
            **self._cache_outputs(),
        }

    def _cache_outputs(self) -> dict[str, str]:
        hit, miss = self.cache_bytes or (0, 0)
        is_known = self.cache_bytes is not None and hit + miss > 0
        return {
            "cache-hit": str(miss == 0).lower() if is_known else "",
            "cache-hit-bytes": str(hit) if is_known else "",
            "cache-miss-bytes": str(miss) if is_known else "",
        }

    def to_json(self) -> str:
        """Return the report for programs: JSON without NaN (such numbers are text), keys in a fixed order."""
        merged = None
        if self.merged is not None:
            merged = {name: value for name, value in asdict(self.merged).items() if name != "root"}
            merged["digest"] = self.merged.digest
        content = {
            "schema_version": SCHEMA_VERSION,
            "outputs": self.outputs(),
            "inputs": dict(self.inputs_public),
            "base_revision": self.base_revision,
            "adapter_digest": self.adapter_digest,
            "merged_digest": self.merged_digest,
            "plan": asdict(self.plan) if self.plan else None,
            "merged": merged,
            "verdict": asdict(self.verdict) if self.verdict else None,
            "release": _release_fields(self.release),
            "problems": [asdict(problem) for problem in self.problems],
            "phases": [{"name": name, "wall_s": seconds} for name, seconds in self.phases],
            "versions": dict(self.versions),
        }
        return json.dumps(_finite(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def to_markdown(self, *, has_files: bool = False) -> str:
        """Return the report for people, the verdict first.

        Args:
            has_files: whether the pictures lie beside it; a job summary can only link to those of the release.
        """
        verdict = self.verdict
        parts = ["## LoRA merge"]
        if verdict is not None:
            parts.append(summary.headline(verdict))
        elif self.problems:
            parts.append("**❌ Stopped, without a verdict.**")
        elif self.release is None:
            parts.append("**Nothing was merged or published.**")
        if self.release is not None:
            parts.append(summary.release_section(self.release))
        if self.problems:
            parts.append(summary.problems_section(self.problems))
        if verdict is not None:
            parts += [summary.diagnoses_section(verdict.diagnoses)] if verdict.diagnoses else []
            parts.append(summary.verdict_section(verdict))
            parts += [summary.quality_section(verdict.quality)] if verdict.quality else []
            parts += [summary.pictures_section(self.pictures, self.release, inline=has_files)] if self.pictures else []
            parts += [summary.modules_section(verdict.modules)] if verdict.modules else []
            parts += [summary.continuations_section(verdict.continuations)] if verdict.continuations else []
        if self.plan is not None:
            section = summary.plan_section(self.plan)
            parts.append(section)
        parts.append(summary.facts_section("Inputs", self.inputs_public))
        parts.append(summary.facts_section("Provenance", self._provenance()))
        parts.append(summary.timings_section(self.phases))
        return "\n\n".join(part for part in parts if part) + "\n"

    def write(self, report_dir: Path, hide: Callable[[str], str] = str) -> Path:
        """Write report.json, report.md and the pictures into `report_dir`, each whole or not at all.

        Args:
            report_dir: made if absent.
            hide: takes secrets out of a text.

        Returns:
            The path of the JSON.

        Raises:
            RunnerError: the folder cannot be made or written.
        """
        try:
            made = _make_folders(report_dir)
            files = {
                **picture_files(self.pictures),
                **({CHECKSUMS: self.checksums} if self.checksums else {}),
                MARKDOWN_FILE: hide(self.to_markdown(has_files=True)).encode("utf-8", "replace"),
                JSON_FILE: hide(self.to_json()).encode("utf-8", "replace"),
            }
            made += [_write(report_dir / name, content) for name, content in files.items()]
            give(made, owner_of(report_dir if report_dir not in made else made[0].parent))
        except OSError as error:
            raise disk_full(error) or RunnerError(
                f"The report cannot be written into {str(report_dir)!r} ({error.strerror}).",
                why="The folder must be writable, and its disk must have room for a few MB.",
                fix="Set `report-dir` to another folder, or make room.",
            ) from error
        return report_dir / JSON_FILE

    def _provenance(self) -> dict[str, object]:
        facts: dict[str, object] = {
            "Base revision": self.base_revision,
            "Adapter digest": self.adapter_digest,
            "Merged digest": self.merged_digest,
        }
        if self.verdict is not None:
            facts["Seed of the verification"] = self.verdict.seed
        return facts | dict(self.versions)

    def _max_probe_error(self) -> float | None:
        rows = self.verdict.modules if self.verdict else ()
        return _largest([row.probe_error for row in rows])

    def _storage_violations(self) -> float | None:
        # A storage check with the limit 0 counts elements or tensors; others measure something else.
        counts = [check.value for check in self._judged(Layer.STORAGE) if check.limit == 0 and check.value is not None]
        return sum(counts) if counts else None

    def _end_to_end_error(self) -> float | None:
        checks = self._judged(Layer.END_TO_END)
        return _largest([check.value for check in checks if check.limit is not None])  # what has none is no error

    def _judged(self, layer: Layer) -> list[Check]:
        checks = self.verdict.checks if self.verdict else ()
        return [check for check in checks if check.layer is layer and check.outcome in (Outcome.PASS, Outcome.FAIL)]


def _largest(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return max(known, key=lambda value: math.inf if math.isnan(value) else value) if known else None


def _text(value: float | None) -> str:
    if value is None:
        return ""
    return str(int(value)) if math.isfinite(value) and value == int(value) and abs(value) < 1e15 else repr(value)


def _release_fields(release: Published | None) -> dict[str, str | bool | None] | None:
    if release is None:
        return None
    return {
        "repo_id": release.repo_id,
        "tag": release.tag,
        "commit": release.commit,
        "url": release.url,
        "created": release.created,
        "pull_request": release.pull_request,
    }


def _finite(value: object) -> object:
    match value:
        case float() if not math.isfinite(value):
            return repr(value)
        case dict():
            return {str(key): _finite(item) for key, item in value.items()}
        case list() | tuple():
            return [_finite(item) for item in value]
        case str():
            return str(value).encode("utf-8", "replace").decode("utf-8")
    return value


def _make_folders(folder: Path) -> list[Path]:
    """Make `folder` and what is missing above it; return those that were made, the outermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing[::-1]


def _write(path: Path, content: bytes) -> Path:
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        Path(name).chmod(0o644)  # mkstemp gives 0600, and the runner's user is not ours
        return Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
