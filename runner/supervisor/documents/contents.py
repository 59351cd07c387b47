"""What a release has on top of the merged folder: card, manifest, pictures, checksums and signature. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from runner.protocol.digests import FileDigest, FileOrigins
from runner.protocol.plan_summary import PlanSummary
from runner.supervisor.documents.card import CardFacts, make_card
from runner.supervisor.documents.pictures import picture_files
from runner.supervisor.documents.provenance import (
    CARD,
    CHECKSUMS,
    MANIFEST,
    REPORT_FOLDER,
    SIGNATURE,
    MergeFacts,
    checksums,
    manifest,
    release_digests,
)
from runner.supervisor.signature import SigningKey, sign


def merge_facts(plan: PlanSummary, versions: Mapping[str, str], origins: FileOrigins) -> MergeFacts:
    """Return what card and manifest tell of the merge."""
    return MergeFacts(
        peft_type=plan.peft_type,
        output_dtype=plan.output_dtype,
        tensors_merged=plan.tensors_merged,
        tensors_added=plan.tensors_added,
        tensors_copied=plan.tensors_copied,
        tensors_cast=plan.tensors_cast,
        versions=versions,
        origins=origins,
    )


def make_documents(
    facts: CardFacts, files: Iterable[FileDigest], *, key: SigningKey | None, archived: Iterable[FileDigest] = ()
) -> dict[str, bytes]:
    """Return the documents by path; equal for equal arguments, but for the random part of a signature.

    Args:
        facts: everything that the card says.
        files: of the merged folder.
        key: signs the release; None for no signature.
        archived: the adapter's files in the release.
    """
    files, archived = tuple(files), tuple(archived)
    documents = {
        CARD: make_card(facts),
        MANIFEST: manifest(
            facts.origin, facts.facts, facts.verdict, files, signed_by=facts.signed_by, archived=archived
        ),
        **picture_files(facts.pictures, under=REPORT_FOLDER),
    }
    documents[CHECKSUMS] = checksums(release_digests((*files, *archived), documents))
    if key is not None:
        digests = release_digests((*files, *archived), documents)
        documents[SIGNATURE] = sign(key, name=facts.repo_id, digests=digests, signature_path=SIGNATURE)
    return documents
