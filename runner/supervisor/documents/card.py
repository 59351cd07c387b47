"""The model card of a release: README.md with metadata for the Hub and text for people. Pure: facts in, bytes out.

Equal facts give equal bytes. No local path, time or run is told; a local base or adapter is named by its digest.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from runner.protocol.verdict import Check, Quality, Status, Verdict
from runner.supervisor.documents import frontmatter
from runner.supervisor.documents.canvas import Picture
from runner.supervisor.documents.inherited import Inherited
from runner.supervisor.documents.loading import Loading
from runner.supervisor.documents.markdown import code, escape, table
from runner.supervisor.documents.provenance import (
    CHECKSUMS,
    MANIFEST,
    REPORT_FOLDER,
    SIGNATURE,
    AdapterOrigin,
    MergeFacts,
    Origin,
    quality_numbers,
    rounded,
)

OWN_TAG = "lora-merge"
_QUALITIES = {
    "retention": "of the adapter's change kept by the output dtype",
    "effect": "effect of the adapter on the logits (rms, over their std)",
    "effect_retention": "of the adapter's effect on the logits kept",
    "effect_error": "error of the merged logits, over that effect",
    "kl_mean_nats": "mean KL from unmerged to merged, nats per token",
    "kl_p99_nats": "its 99th percentile",
    "kl_base_mean_nats": "mean KL from unmerged to base, for comparison",
    "top1_agreement": "tokens with the same most likely successor",
    "tokens": "tokens compared",
    "perplexity_ratio": "perplexity of the publisher's text, merged over unmerged",
}
_quoted = partial(json.dumps, ensure_ascii=False)  # JSON's escapes beyond the BMP are two characters in Python


@dataclass(frozen=True, slots=True, kw_only=True)
class CardFacts:
    """Everything that a card says.

    Attributes:
        repo_id: where the release goes; for a folder, its name.
        tag: its name.
        folder: path of the release as seen from beside that folder; None for a Hub.
        origin: what went in.
        facts: what the merge did.
        merged_digest: of the files of the merged folder.
        verdict: what the judge said.
        pictures: of the verdict, which lie beside the card.
        inherited: metadata of base and adapter.
        loading: what to import.
        signed_by: fingerprint of the key that signs the release, or None.
    """

    repo_id: str
    tag: str
    origin: Origin
    facts: MergeFacts
    merged_digest: str
    verdict: Verdict
    pictures: tuple[Picture, ...] = ()
    inherited: Inherited
    loading: Loading = field(default_factory=Loading)
    signed_by: str | None = None
    folder: str | None = None


def make_card(facts: CardFacts) -> bytes:
    """Return README.md: YAML front matter and Markdown, UTF-8."""
    parts = [
        _front_matter(facts),
        f"# {escape(facts.repo_id.rpartition('/')[2])}",
        _story(facts),
        "## Use",
        _use(facts),
        "## Verification",
        _verification(facts.verdict),
        *(f"![{escape(picture.title)}]({REPORT_FOLDER}{picture.name}.png)" for picture in facts.pictures),
        "## Provenance",
        _provenance(facts),
        "## Check it yourself",
        _check_it(facts),
    ]
    return ("\n\n".join(parts) + "\n").encode()


def _front_matter(facts: CardFacts) -> str:
    inherited, origin = facts.inherited, facts.origin
    fields: dict[str, str | Sequence[str] | None] = {
        "base_model": origin.base_repo_id,
        "base_model_relation": "finetune" if origin.base_repo_id else None,
        "library_name": "transformers",
        "license": inherited.licence,
        "license_name": inherited.licence_name,
        "license_link": inherited.licence_link,
        "language": inherited.languages,
        "pipeline_tag": facts.loading.task or inherited.pipeline_tag,
        "datasets": inherited.datasets,
        "tags": [OWN_TAG, *(tag for tag in inherited.tags if tag != OWN_TAG)],
    }
    return frontmatter.dump(fields)


def _story(facts: CardFacts) -> str:
    merge = facts.facts
    counts = f"{merge.tensors_merged} tensors were changed, {merge.tensors_copied} are the base's bytes"
    counts += f", {merge.tensors_cast} were cast" if merge.tensors_cast else ""
    counts += f", {merge.tensors_added} were added" if merge.tensors_added else ""
    origin = facts.origin
    if origin.combination is None:
        what = f"the {escape(merge.peft_type)} adapter {_adapter(origin.adapters[0])}"
    else:
        what = f"{len(origin.adapters)} {escape(merge.peft_type)} adapters ({code(origin.combination.kind)}: "
        what += ", ".join(f"{_adapter(adapter)} × {weight!r}" for adapter, weight in origin.weighted) + ")"
    return (
        f"This is {_base(origin)} with {what} merged into its weights "
        f"({code(merge.output_dtype)}). It loads as any transformers model; PEFT is not needed. "
        f"{counts}."
    )


def _use(facts: CardFacts) -> str:
    place = _quoted(facts.folder) if facts.folder else f"{_quoted(facts.repo_id)}, revision={_quoted(facts.tag)}"
    loading, pin = facts.loading, "" if facts.folder else ", or better the commit that it points to"
    names = sorted(filter(None, (loading.model, loading.tokenizer)))
    lines = [
        f"from transformers import {', '.join(names)}",
        "",
        f"model = {loading.model}.from_pretrained({place})",
    ]
    if loading.tokenizer is not None:
        noun = "processor" if loading.tokenizer == "AutoProcessor" else "tokenizer"
        lines.append(f"{noun} = {loading.tokenizer}.from_pretrained({place})")
    return "```python\n" + "\n".join(lines) + f"\n```\n\nPin the tag {code(facts.tag)}{pin}."


def _verification(verdict: Verdict) -> str:
    says = {
        Status.PASS: "The merge was judged before it was published, by code that uses nothing of the merge.",
        Status.PASS_LOSSY: "The merge is exact, but the output dtype kept less than 0.9 of the adapter's change.",
        Status.NOT_VERIFIED: "A part of the judgement did not run, so nobody knows whether this merge is right. It was "
        "published because `allow` names `not-verified`.",
    }.get(verdict.status, "The merge did not pass.")
    rows = [_check_row(check) for check in verdict.checks]
    parts = [f"Verdict: **{verdict.status.value.replace('_', ' ')}**. {says}"]
    if verdict.loosened:
        parts.append(f"**Loosened limits**: {verdict.loosened_text}.")
    if rows:
        parts.append(table(["Part", "Claim", "Outcome", "Measured", "Limit"], rows))
    if verdict.quality is not None:
        parts.append(_quality(verdict.quality))
    return "\n\n".join(parts)


def _check_row(check: Check) -> list[str]:
    value, limit = rounded(check.value), rounded(check.limit)
    return [
        escape(check.layer.value.replace("_", " ")),
        escape(check.name),
        check.outcome.value,
        "" if value is None else f"{value:g}",
        "" if limit is None else f"{limit:g}",
    ]


def _quality(quality: Quality) -> str:
    numbers = quality_numbers(quality) or {}
    rows = [[escape(text), f"{numbers[name]:g}"] for name, text in _QUALITIES.items() if numbers[name] is not None]
    return "What rounding to the output dtype costs (reported, not judged):\n\n" + table(["Quality", "Value"], rows)


def _provenance(facts: CardFacts) -> str:
    origin = facts.origin
    rows = [
        ["base", _base(origin)],
        [
            "base revision" if origin.base_commit else "base digest",
            code(origin.base_commit or origin.base_digest or ""),
        ],
        *_adapter_rows(origin),
        ["merged digest", code(facts.merged_digest)],
        ["input digest", code(origin.input_digest())],
        ["dtype", code(origin.dtype)],
        ["rounding", code(origin.rounding.text)],
        ["made by", code(f"lora-merge-action {origin.version}")],
    ]
    if facts.signed_by is not None:
        rows.append(["signed with the key", code(facts.signed_by)])
    return table(["", ""], rows)


def _adapter_rows(origin: Origin) -> list[list[str]]:
    rows = []
    for number, (adapter, weight) in enumerate(origin.weighted, start=1):
        noun = "adapter" if origin.combination is None else f"adapter {number}"
        rows.append([noun, _adapter(adapter)])
        if adapter.commit:
            rows.append([f"{noun} revision", code(adapter.commit)])
        rows.append([f"{noun} digest", code(adapter.digest)])
        if origin.combination is not None:
            rows.append([f"{noun} weight", code(repr(weight))])
    if origin.combination is not None:
        rows.append(["combination", code(origin.combination.text)])
        rows.append(["adapters digest", code(origin.digest_of_adapters)])
    return rows


def _check_it(facts: CardFacts) -> str:
    origin = facts.origin
    rows = [
        ["mode", code("verify")],
        ["merged-path", code(facts.folder or f"{facts.repo_id}@{facts.tag}")],
        ["base-model", code(origin.base_repo_id) if origin.base_repo_id else _base(origin)],
        ["base-revision", code(origin.base_commit) if origin.base_commit else ""],
        ["adapter-path", "<br>".join(_adapter_references(origin))],
        *_combination_rows(origin),
        *_rounding_rows(origin),
    ]
    return (
        f"{code(MANIFEST)} says what the model was made from; {code(CHECKSUMS)} has the sha256 of every file:\n\n"
        + _commands(facts)
        + "\n\nTo judge the merge again, run lora-merge-action with\n\n"
        + table(["Input", "Value"], [row for row in rows if row[1]])
    )


def _commands(facts: CardFacts) -> str:
    """Return how the bytes are compared with what was published, as a block for a shell."""
    get = f"hf download {shlex.quote(facts.repo_id)} --revision {shlex.quote(facts.tag)} --local-dir model"
    lines = [
        get if facts.folder is None else f"cp -r {shlex.quote(facts.folder)} model",
        f"(cd model && sha256sum --check --quiet {CHECKSUMS})",
    ]
    after = ""
    if facts.signed_by is not None:
        lines += [
            "pip install model-signing pyOpenSSL",
            "python -m model_signing verify key model --signature model/" + SIGNATURE + " \\\n"
            "    --public_key publisher.pub --ignore_unsigned_files",
        ]
        after = (
            f"\n\nThe publisher's public key does not come from here: {code('sha256sum publisher.pub')} must give "
            f"{code(facts.signed_by)}."
        )
    return "```sh\n" + "\n".join(lines) + "\n```" + after


def _base(origin: Origin) -> str:
    local = f"a local base (digest {code(_short(origin.base_digest))})"
    return code(origin.base_repo_id) if origin.base_repo_id else local


def _adapter(adapter: AdapterOrigin) -> str:
    if adapter.repo_id:
        return code(adapter.repo_id)
    return f"from a local folder (digest {code(_short(adapter.digest))})"


def _adapter_references(origin: Origin) -> Iterator[str]:
    """Yield one line of `adapter-path` for each adapter."""
    for adapter, weight in origin.weighted:
        behind = "" if origin.combination is None else f" {weight!r}"
        if adapter.repo_id and adapter.commit:
            yield code(f"{adapter.repo_id}@{adapter.commit}{behind}")
        else:
            yield f"the folder with the digest {code(_short(adapter.digest))}" + (behind and f", weight{behind}")


def _combination_rows(origin: Origin) -> list[list[str]]:
    wanted = origin.combination
    if wanted is None:
        return []
    given = {
        "combination": wanted.kind,
        "combination-density": wanted.density,
        "combination-seed": wanted.seed,
        "combination-majority-sign": wanted.majority_sign,
    }
    return [[name, code(str(value))] for name, value in given.items() if value is not None]


def _rounding_rows(origin: Origin) -> list[list[str]]:
    if not origin.rounding.is_stochastic:
        return []
    return [["rounding", code(origin.rounding.kind)], ["rounding-seed", code(str(origin.rounding.seed))]]


def _short(digest: str | None) -> str:
    return (digest or "unknown")[:16]
