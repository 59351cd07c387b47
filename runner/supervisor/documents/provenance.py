"""Where a release comes from and what is in it: the input digest, and merge-manifest.json. Pure; reads only digests.

Published bytes must be equal for equal inputs (design decision 7), so nothing here knows a time, a run, a machine or
a local path, and measured numbers are rounded to two digits, since their last ones depend on the processor.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from runner.files.sidecars.folders import module_folders
from runner.files.sidecars.names import WEIGHT_SUFFIXES, may_come_from_adapter
from runner.protocol.combination import Combination
from runner.protocol.digests import FileDigest, FileOrigins, digest_file, digest_of
from runner.protocol.rounding import Rounding
from runner.protocol.verdict import Check, Quality, Verdict

SCHEMA_VERSION = 1
CARD = "README.md"
MANIFEST = "merge-manifest.json"
CHECKSUMS = "checksums.txt"
SIGNATURE = "model.sig"
REPORT_FOLDER = "merge-report/"
NEAREST_ROUNDING = Rounding()


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterOrigin:
    """Where one adapter comes from; the fields as in `Origin`."""

    repo_id: str | None
    commit: str | None
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Everything that decides the bytes of the merged weights.

    Attributes:
        base_repo_id: None for a local folder.
        base_commit: 40 hex digits; None for a local folder.
        base_digest: of the files of a local folder (see `base_digest`); None for a repository.
        adapter_repo_id: of the first adapter; None for a local folder.
        adapter_commit: 40 hex digits; None for a local folder.
        adapter_digest: of the first adapter's files that matter (see `adapter_digest`).
        dtype: as asked for, "auto" included.
        version: of this action.
        more_adapters: the others, in their order.
        combination: how several become one; None exactly when there is one.
        rounding: of the values that the adapter changes.
    """

    base_repo_id: str | None
    base_commit: str | None
    base_digest: str | None
    adapter_repo_id: str | None
    adapter_commit: str | None
    adapter_digest: str
    dtype: str
    version: str
    more_adapters: tuple[AdapterOrigin, ...] = ()
    combination: Combination | None = None
    rounding: Rounding = NEAREST_ROUNDING

    @property
    def adapters(self) -> tuple[AdapterOrigin, ...]:
        """All adapters in their order."""
        first = AdapterOrigin(repo_id=self.adapter_repo_id, commit=self.adapter_commit, digest=self.adapter_digest)
        return (first, *self.more_adapters)

    @property
    def weighted(self) -> tuple[tuple[AdapterOrigin, float], ...]:
        """All adapters in their order, each with its weight."""
        weights = (1.0,) if self.combination is None else self.combination.weights
        return tuple(zip(self.adapters, weights, strict=True))

    @property
    def digest_of_adapters(self) -> str:
        """The adapter's digest; of several, sha256 over their digests, one a line in their order."""
        if not self.more_adapters:
            return self.adapter_digest
        return hashlib.sha256("".join(f"{adapter.digest}\n" for adapter in self.adapters).encode()).hexdigest()

    def input_digest(self) -> str:
        """Return 64 hex digits: sha256 over the canonical JSON of all fields. Equal inputs, equal digest."""
        fields = {"schema_version": SCHEMA_VERSION, **asdict(self)}
        if self.combination is None:  # one adapter: the digest that releases had before there could be several
            del fields["more_adapters"], fields["combination"]
        if not self.rounding.is_stochastic:  # likewise
            del fields["rounding"]
        text = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeFacts:
    """What the merge did, for the manifest and the card.

    Attributes:
        peft_type: the tuner, for example "LORA".
        output_dtype: of the merged weights, for example "BF16".
        tensors_merged: stored tensors that the adapter changed.
        tensors_added: stored tensors that the base did not have.
        tensors_copied: stored tensors whose bytes are the base's.
        tensors_cast: stored tensors that only changed their dtype.
        versions: library name → version, for example {"torch": "2.13.0"}.
        origins: of the files beside the weights.
    """

    peft_type: str
    output_dtype: str
    tensors_merged: int
    tensors_added: int
    tensors_copied: int
    tensors_cast: int
    versions: Mapping[str, str]
    origins: FileOrigins = field(default_factory=FileOrigins)


def released(files: Iterable[FileDigest]) -> tuple[FileDigest, ...]:
    """Return the files of a merged folder that a release holds as they are: all but those added at publish."""
    return tuple(sorted((file for file in files if not is_added_at_publish(file.path)), key=lambda file: file.path))


def is_added_at_publish(path: str) -> bool:
    """Return whether a file comes on top of the merged folder: card, manifest, checksums, signature, pictures."""
    return path in (CARD, MANIFEST, CHECKSUMS, SIGNATURE) or path.startswith(REPORT_FOLDER)


def release_digests(files: Iterable[FileDigest], documents: Mapping[str, bytes]) -> dict[str, str]:
    """Return path → sha256 of everything in a release, sorted by path.

    Args:
        files: of the merged folder.
        documents: what is added to it, by path.
    """
    digests = {file.path: file.sha256 for file in released(files)}
    digests |= {path: hashlib.sha256(content).hexdigest() for path, content in documents.items()}
    return dict(sorted(digests.items()))


def checksums(digests: Mapping[str, str]) -> bytes:
    """Return checksums.txt as `sha256sum -c` and `actions/attest` read it: UTF-8, one file a line.

    Args:
        digests: path → sha256, 64 hex digits.
    """
    return "".join(_checksum_line(path, sha256) for path, sha256 in digests.items()).encode("utf-8", "surrogateescape")


def _checksum_line(path: str, sha256: str) -> str:
    escaped = path.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
    return f"{'' if escaped == path else chr(92)}{sha256}  {escaped}\n"  # so coreutils marks a name that it escaped


def adapter_digest(root: Path) -> str:
    """Return one digest of the files in `root` that a merge takes from an adapter.

    These are adapter_config.json, `adapter*.safetensors`, and what a release may take of its own: tokenizer, templates,
    processor, generation config, modules of sentence-transformers, notices, and config.json for the names of labels.
    The README and what a training leaves behind do not count, so they can change without a new digest.
    """
    modules = module_folders(root)
    return _digest(root, lambda path: _is_adapter_file(path) or may_come_from_adapter(path) or path.startswith(modules))


def base_digest(root: Path) -> str:
    """Return one digest of the files in `root` that a merge takes from a local base, weights included.

    Reads every byte of the weights. Other formats of the same weights, hidden files and the README do not count.
    """
    modules = module_folders(root)
    return _digest(root, lambda path: _is_base_file(path) or path.startswith(modules))


def manifest(
    origin: Origin,
    facts: MergeFacts,
    verdict: Verdict,
    files: Iterable[FileDigest],
    *,
    signed_by: str | None = None,
    archived: Iterable[FileDigest] = (),
) -> bytes:
    """Return merge-manifest.json: UTF-8 JSON with sorted keys; equal for equal arguments.

    Args:
        origin: what went in.
        facts: what the merge did.
        verdict: what the judge said; its texts and times are left out.
        files: of the merged folder; what is added at publish is not listed.
        signed_by: fingerprint of the key that signs the release, or None.
        archived: the adapter's files in the release.
    """
    content = released(files)
    document: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "input_digest": origin.input_digest(),
        "merged_digest": digest_of(content),
        "base": {"repo_id": origin.base_repo_id, "commit": origin.base_commit, "digest": origin.base_digest},
        "adapter": {
            "repo_id": origin.adapter_repo_id,
            "commit": origin.adapter_commit,
            "digest": origin.adapter_digest,
            "peft_type": facts.peft_type,
        },
        **_several(origin),
        "options": {"dtype": origin.dtype, "rounding": asdict(origin.rounding)},
        "merge": {
            "output_dtype": facts.output_dtype,
            "tensors_merged": facts.tensors_merged,
            "tensors_added": facts.tensors_added,
            "tensors_copied": facts.tensors_copied,
            "tensors_cast": facts.tensors_cast,
        },
        "versions": {"lora-merge-action": origin.version, **facts.versions},
        "verdict": {
            "status": verdict.status.value,
            "seed": verdict.seed,
            "checks": [_check(check) for check in verdict.checks],
            "quality": quality_numbers(verdict.quality),
        },
        "files": [asdict(file) for file in content],
        "origins": _origins(facts.origins, content),
    }
    where_given = {"signed_by": signed_by, "archive": [asdict(file) for file in archived]}
    document |= {name: value for name, value in where_given.items() if value}
    return (json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _several(origin: Origin) -> dict[str, Any]:
    """Return the manifest's part on several adapters: all of them, in their order, and how they became one."""
    wanted = origin.combination
    if wanted is None:
        return {}
    adapters = [{**asdict(adapter), "weight": weight} for adapter, weight in origin.weighted]
    how = {"kind": wanted.kind, "density": wanted.density, "seed": wanted.seed, "majority_sign": wanted.majority_sign}
    return {"adapters": adapters, "adapters_digest": origin.digest_of_adapters, "combination": how}


def _origins(origins: FileOrigins, content: Iterable[FileDigest]) -> dict[str, Any]:
    """Return the manifest's part on files: whose bytes each one has, and what of both sides is in no release."""
    carried = {*origins.base, *origins.adapter}
    return {
        "base": list(origins.base),
        "adapter": list(origins.adapter),
        "edited": {path: list(keys) for path, keys in origins.edited.items()},
        "written": [file.path for file in content if file.path not in carried],
        "left_out": {"base": list(origins.left_of_base), "adapter": list(origins.left_of_adapter)},
    }


def rounded(value: float | None) -> float | None:
    """Return `value` with two significant digits; None for None and for what is not finite."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.2g}")


def quality_numbers(quality: Quality | None) -> dict[str, float | int | None] | None:
    """Return the measured qualities by name; ratios near 1 keep four decimals, the others two digits."""
    if quality is None:
        return None
    numbers: dict[str, float | int | None] = {}
    perplexity = quality.perplexity
    found = {
        name: value
        for name, value in asdict(quality).items()
        if name not in ("perplexity", "prompts", "native", "tasks")
    }
    found["perplexity_ratio"] = perplexity.ratio if perplexity is not None else None
    for name, value in found.items():
        if value is None:
            numbers[name] = None
        elif name in ("retention", "effect_retention", "top1_agreement", "perplexity_ratio") and math.isfinite(value):
            numbers[name] = round(value, 4)
        elif name.startswith("nll_") and math.isfinite(value):
            numbers[name] = round(value, 3)
        else:
            numbers[name] = value if name == "tokens" else rounded(value)
    return numbers


def _check(check: Check) -> dict[str, Any]:
    return {
        "layer": check.layer.value,
        "name": check.name,
        "outcome": check.outcome.value,
        "value": rounded(check.value),
        "limit": check.limit if check.limit is None or math.isfinite(check.limit) else None,
        **({} if check.loosened_from is None else {"loosened_from": check.loosened_from}),
    }


def _digest(root: Path, is_wanted: Callable[[str], bool]) -> str:
    paths = (path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    return digest_of(digest_file(root, path) for path in sorted(paths) if is_wanted(path))


def _is_adapter_file(path: str) -> bool:
    is_weights = path.startswith("adapter") and path.endswith(".safetensors")
    return "/" not in path and (path == "adapter_config.json" or is_weights)


def _is_base_file(path: str) -> bool:
    if any(part.startswith(".") for part in path.split("/")) or is_added_at_publish(path):
        return False
    return path.endswith(".safetensors") or not path.endswith(WEIGHT_SUFFIXES)
