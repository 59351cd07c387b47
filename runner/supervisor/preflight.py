"""Everything that can be refused before there is work: rights, tag, adapter, base, and a release that exists already.

Only questions are asked and inputs are fetched; nothing is written to the target. No torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from runner import __version__
from runner.files.adapter.base_identity import departures, named_base
from runner.files.adapter.combinable import check_combinable
from runner.files.adapter.folder import Adapter
from runner.files.layout import read_checkpoint
from runner.files.sidecars.leftovers import check_leftovers
from runner.supervisor.converted import Pickles, conversion_note
from runner.supervisor.disk import REPORT_BYTES, Need, check_room
from runner.supervisor.documents.provenance import AdapterOrigin, Origin, adapter_digest, base_digest
from runner.supervisor.hub import Hub, Keyless, Login, OnDownload, Snapshot, connect, read_patience
from runner.supervisor.inputs.read import IDENTITY_TOKEN, IDENTITY_URL, Inputs, RepoRef
from runner.supervisor.modernised import read_modern
from runner.supervisor.publish import Destination, FolderDestination, HubDestination, Wanted

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Hubs:
    """The Hub, with the token that may write and with the one that reads."""

    writing: Hub
    reading: Hub


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """What goes in, exactly: every name is a commit or a digest now.

    Attributes:
        adapters: on disk, in the order of the inputs.
        base_ref: the base at its commit, or a local folder (with the converted weights, where they were pickled).
        origin: what decides the bytes of the result.
        notes: what the user should know, one sentence each.
    """

    adapters: tuple[Adapter, ...]
    base_ref: RepoRef
    origin: Origin
    notes: tuple[str, ...]

    @property
    def adapter(self) -> Adapter:
        """The first adapter, which decides what is not in the weights."""
        return self.adapters[0]


def open_hubs(
    inputs: Inputs,
    environ: Mapping[str, str],
    *,
    mask: Callable[[str], None],
    on_download: OnDownload,
    say: Callable[[str], None],
) -> Hubs:
    """Return the Hub with what may write and with what reads, as patient as `environ` asks; nothing is requested yet.

    Args:
        inputs: name the Hub and the tokens.
        environ: holds what a job without a token proves itself with.
        mask: told every token that is made later.
        on_download: told how far a download is; see `connect`.
        say: told of long waits.

    Raises:
        InputError: see `read_patience`.
    """
    timeout_s, patience = read_patience(environ)
    patience = replace(patience, named_wait_s=max(patience.named_wait_s, inputs.machine.phase_timeout_s or 0.0))

    def hub(token: str | None, login: Login | None = None) -> Hub:
        return connect(
            inputs.placement.endpoint,
            token=token,
            login=login,
            timeout_s=timeout_s,
            patience=patience,
            on_download=on_download,
            say=say,
        )

    reading = hub(inputs.base_token)
    if not inputs.is_keyless or inputs.placement.repo_id is None:
        return Hubs(writing=hub(inputs.hf_token), reading=reading)
    login = Keyless(
        endpoint=reading.endpoint,
        repo_id=inputs.placement.repo_id,
        identity_url=environ[IDENTITY_URL],
        identity_token=environ[IDENTITY_TOKEN],
        on_secret=mask,
        patience=patience,
        say=say,
    )
    return Hubs(writing=hub(None, login), reading=reading)


def open_destination(inputs: Inputs, hubs: Hubs) -> Destination | None:
    """Return where the release goes, or None where nothing is published; nothing is requested yet."""
    where = inputs.placement
    if inputs.mode != "publish" or inputs.tag is None:
        return None
    wanted = Wanted(
        tag=inputs.tag,
        also_tags=where.also_tags,
        branch=where.branch,
        is_staged=where.is_staged,
        create_pr=where.create_pr,
        private=inputs.private,
        on_existing_tag=inputs.on_existing_tag,
        commit_message=inputs.commit_message,
        allows_adapter="same-repo" in inputs.allow,
        is_protected=where.is_protected(inputs.tag),
        allow_not_verified="not-verified" in inputs.allow,
    )
    if where.folder is not None:
        return FolderDestination(root=where.folder, wanted=wanted)
    if where.repo_id is None:
        return None
    return HubDestination(hub=hubs.writing, repo_id=where.repo_id, wanted=wanted)


def resolve(inputs: Inputs, hubs: Hubs, cache_dir: Path, pickles: Pickles, say: Say) -> Resolved:
    """Return adapters and base at exact commits; the adapters are downloaded and validated, the base is not.

    Args:
        inputs: of this run.
        hubs: to read from.
        cache_dir: where downloads are kept.
        pickles: what becomes of pickled weights.
        say: is told what was found.

    Raises:
        AdapterError: an adapter cannot be merged into anything, or the adapters cannot be combined.
        InputError: the base is not given, and the adapter does not name one on the Hub.
        HubError: a repository cannot be read.
    """
    fetched = [
        hubs.reading.snapshot(ref, kind="adapter", cache_dir=cache_dir, pickles=pickles.allowed)
        for ref in inputs.adapters
    ]
    snapshots = [replace(snapshot, root=pickles.adapter(snapshot.root)) for snapshot in fetched]
    modern = [read_modern(snapshot.root, inputs.allow, pickles.into) for snapshot in snapshots]
    adapters = tuple(one.adapter for one in modern)
    for snapshot, read in zip(snapshots, adapters, strict=True):
        say(f"Adapter: {_name(snapshot)}, {read.peft_type}, {len(read.tensors)} tensors.")
        check_leftovers(snapshot.root, inputs.allow)
    if inputs.combination is not None:
        check_combinable(adapters, inputs.combination)
    wanted = inputs.base or named_base(adapters[0], inputs.base_revision)
    base_ref = wanted if wanted.repo_id is None else replace(wanted, revision=hubs.reading.resolve(wanted))
    converted: list[str] = []
    for before, after in zip(fetched, snapshots, strict=True):
        converted += conversion_note(before.root, after.root, "adapter")
    converted += dict.fromkeys(note for one in modern for note in one.notes)
    if base_ref.path is not None:
        path = pickles.base(base_ref.path)
        converted += conversion_note(base_ref.path, path, "base")
        base_ref = replace(base_ref, path=path)
        read_checkpoint(path)  # a broken folder is told before its bytes are hashed
        say("Base: a local folder; its files are hashed, because no commit names them.")
    else:
        say(f"Base: {base_ref.display}.")
    notes = (*converted, *departures(adapters, base_ref))
    for note in notes:
        say(note)
    first, *more = [
        _origin(replace(snapshot, root=read.root)) for snapshot, read in zip(snapshots, adapters, strict=True)
    ]
    origin = Origin(
        base_repo_id=base_ref.repo_id,
        base_commit=base_ref.revision,
        base_digest=base_digest(base_ref.path) if base_ref.path is not None else None,
        adapter_repo_id=first.repo_id,
        adapter_commit=first.commit,
        adapter_digest=first.digest,
        dtype=inputs.dtype,
        version=__version__,
        more_adapters=tuple(more),
        combination=inputs.combination,
        rounding=inputs.rounding,
    )
    return Resolved(adapters=adapters, base_ref=base_ref, origin=origin, notes=notes)


def check_disks(inputs: Inputs, hubs: Hubs, resolved: Resolved, *, work: Path, cache: Path) -> None:
    """Return if downloads, merged model and report fit on their disks, as far as that is known before a plan.

    Raises:
        NotEnoughDisk: they do not.
        HubError: the base cannot be listed.
    """
    if inputs.mode != "publish":
        return
    ref = resolved.base_ref
    if ref.path is not None:
        total, missing = sum(path.stat().st_size for path in ref.path.glob("model*.safetensors")), 0
    else:
        total, missing = hubs.reading.needs(ref, cache_dir=cache)
    merged = (path for path in work.rglob("*.safetensors") if "converted" not in path.parts)
    kept = sum(path.stat().st_size for path in merged)  # by a run that was interrupted
    least = total if inputs.dtype in ("auto", "float32") else total // 2
    check_room(
        [
            Need(folder=cache, size_bytes=missing, name="cache-dir", what="the base"),
            Need(folder=work, size_bytes=max(least - kept, 0), name="work-dir", what="the merged model"),
            Need(folder=inputs.report_dir, size_bytes=REPORT_BYTES, name="report-dir", what="the report"),
        ]
    )


def fetch_base(resolved: Resolved, hubs: Hubs, cache_dir: Path, pickles: Pickles, *, headers_only: bool) -> Path:
    """Return the base as a folder whose headers are sound, at the commit that was resolved.

    Args:
        resolved: what goes in.
        hubs: to read from.
        cache_dir: where downloads are kept.
        pickles: what becomes of pickled weights.
        headers_only: download no weights (but pickled ones); the folder is good for a plan, and for nothing else.

    Raises:
        RunnerError: it cannot be downloaded, or is no checkpoint.
    """
    if headers_only:
        root = hubs.reading.outline(resolved.base_ref, cache_dir=cache_dir, pickles=pickles.allowed).root
    else:
        root = hubs.reading.snapshot(resolved.base_ref, kind="base", cache_dir=cache_dir, pickles=pickles.allowed).root
    root = pickles.base(root)
    read_checkpoint(root)
    return root


def fetch_merged(inputs: Inputs, hubs: Hubs, cache_dir: Path) -> Path:
    """Return the folder that `mode: verify` judges.

    Raises:
        RunnerError: it cannot be downloaded. Whether it is a sound checkpoint is the judge's question.
    """
    assert inputs.merged is not None  # noqa: S101  (`mode: verify` is refused without `merged-path`)
    return hubs.reading.snapshot(inputs.merged, kind="merged", cache_dir=cache_dir).root


def _origin(snapshot: Snapshot) -> AdapterOrigin:
    return AdapterOrigin(repo_id=snapshot.repo_id, commit=snapshot.commit, digest=adapter_digest(snapshot.root))


def _name(snapshot: Snapshot) -> str:
    return f"{snapshot.repo_id}@{snapshot.commit}" if snapshot.repo_id else "a local folder"
