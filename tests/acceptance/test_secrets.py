"""Unique values are planted as secrets, and everything that a run leaves or shows is searched for them.

Searched while it runs: the arguments of every process, the environment of every process but those that must have a
secret, open and new files of the work folder. Searched afterwards: log, report, summary, outputs, published files,
commit and tag texts. Every text is searched for the value, and for it in base64, hex and percent-encoding.
"""

from __future__ import annotations

import base64
import os
import secrets
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from huggingface_hub import HfApi

from tests.acceptance.action import REPO, TAG, Stage, a_hub
from tests.hub.accounts import Accounts
from tests.hub.faults import FOREVER, Kind
from tests.hub.identity import IdentityProvider
from tests.hub.server import LocalHub
from tests.supervisor.test_signature import pem_of

MAX_FILE_BYTES = 300_000


@dataclass(frozen=True)
class Planted:
    """Secrets by name, and how each may be written."""

    values: Mapping[str, str]

    def found_in(self, content: bytes) -> set[str]:
        """Return the names of the secrets that are in `content`."""
        return {name for name, value in self.values.items() if any(form in content for form in _forms(value))}


@cache
def _forms(value: str) -> tuple[bytes, ...]:
    lines = [line for line in value.splitlines() if not line.startswith("-----") and len(line) > 20]
    return tuple(form for line in lines for form in _forms_of_line(line))


def _forms_of_line(value: str) -> Iterator[bytes]:
    raw = value.encode()
    yield raw
    yield raw.hex().encode()
    yield quote(value, safe="").encode()
    yield "".join(f"%{byte:02x}" for byte in raw).encode()
    yield "".join(f"\\u{ord(char):04x}" for char in value).encode()
    for shift in range(3):  # wherever it stands in what was encoded; the ends depend on their neighbours
        encoded = base64.b64encode(b"\0" * shift + raw)
        yield encoded[4 if shift else 0 : -4]


@dataclass
class Watch:
    """Looks at every process below one, and at the files of a folder, as often as it can."""

    root: int
    folder: Path
    looks: int = 0
    ended_well: bool = False
    workers: int = 0
    contents: dict[str, set[bytes]] = field(default_factory=dict)
    _end: threading.Event = field(default_factory=threading.Event)

    def watch(self) -> None:
        """Look until told to end."""
        while not self._end.is_set():
            for process in _below(self.root):
                self._look_at(process)
            self._look_into_files()
            self.looks += 1
            time.sleep(0.01)
        self.ended_well = True

    def found(self, planted: Planted) -> dict[str, set[str]]:
        """Return where a secret was, with its name."""
        every = {place: planted.found_in(b"\n".join(contents)) for place, contents in self.contents.items()}
        return {place: names for place, names in every.items() if names}

    def end(self) -> None:
        """Stop looking."""
        self._end.set()

    def _look_at(self, process: int) -> None:
        arguments = _read(Path(f"/proc/{process}/cmdline"))
        self._note(f"the arguments of {arguments[:60]!r}", arguments)
        if b"runner.worker.main" in arguments:
            self.workers += 1
            self._note("the environment of the worker", _read(Path(f"/proc/{process}/environ")))

    def _look_into_files(self) -> None:
        walk = os.walk(self.folder)  # unlike rglob it goes on where a folder was removed just now
        for path in (Path(folder, name) for folder, _, names in walk for name in names):
            content = _read(path, MAX_FILE_BYTES)
            if len(content) < MAX_FILE_BYTES:  # weights are the Hub's business
                self._note(f"the file {path.relative_to(self.folder)}", content)

    def _note(self, place: str, content: bytes) -> None:
        self.contents.setdefault(place, set()).add(content)


def _below(root: int) -> Iterator[int]:
    yield root
    for path in Path(f"/proc/{root}/task").glob("*/children"):
        for child in _read(path).split():
            yield from _below(int(child))


def _read(path: Path, most: int = -1) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(most)
    except OSError:
        return b""  # it has ended, or was removed, just now


@dataclass(frozen=True)
class Scene:
    """One run with everything planted."""

    stage: Stage
    hub: LocalHub
    planted: Planted
    folder: Path

    def run(self, environ_of_job: Mapping[str, str] | None = None) -> tuple[int, str, Watch]:
        """Run the action as a step of a workflow does; return its code, its log, and what was watched."""
        (self.folder / "temp").mkdir()
        files = {name: self.folder / name for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY", "GITHUB_STATE")}
        for path in files.values():
            path.touch()
        values = self.planted.values
        environ = self.stage.environ(self.hub, values["hf-token"], self.folder, xet=False) | {
            "GITHUB_ACTIONS": "true",
            "GITHUB_WORKSPACE": str(self.folder),
            "GITHUB_EVENT_NAME": "workflow_dispatch",
            "RUNNER_TEMP": str(self.folder / "temp"),
            "INPUT_HF-TOKEN": values["hf-token"],
            "INPUT_BASE-TOKEN": values["base-token"],
            "INPUT_SIGNING-KEY": values["signing-key"],
            "ACTIONS_ID_TOKEN_REQUEST_URL": "http://127.0.0.1:9/token?x=1",
            "ACTIONS_ID_TOKEN_REQUEST_TOKEN": values["id-token request"],
            "ACTIONS_RUNTIME_TOKEN": values["runtime token"],
            **{name: str(path) for name, path in files.items()},
            "HF_TOKEN": "",
            **(environ_of_job or {}),
        }
        process = subprocess.Popen(
            self.stage.command(self.folder, "--work-dir", str(self.folder / "work")),
            cwd=self.folder, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        watch = Watch(root=process.pid, folder=self.folder)
        thread = threading.Thread(target=watch.watch)
        thread.start()
        log, _ = process.communicate(timeout=180)
        watch.end()
        thread.join()
        assert watch.ended_well
        watch._look_into_files()
        return process.returncode, log, watch

    def without_masks(self, log: str) -> bytes:
        """Return the log without the commands by which the runner is told what to hide: it does not show those."""
        return "\n".join(line for line in log.splitlines() if not line.startswith("::add-mask::")).encode()


@pytest.fixture
def scene(stage: Stage, tmp_path: Path) -> Iterator[Scene]:
    with a_hub(tmp_path / "hub") as (hub, token):
        pem = pem_of(ec.generate_private_key(ec.SECP256R1()))
        planted = Planted(
            {
                "hf-token": token,
                "base-token": hub.add_token("alice", "read"),
                "signing-key": pem,
                "id-token request": secrets.token_hex(20),
                "runtime token": secrets.token_hex(20),
            }
        )
        folder = tmp_path / "run"
        folder.mkdir()
        yield Scene(stage=stage, hub=hub, planted=planted, folder=folder)


def _published(hub: LocalHub) -> bytes:
    repo = hub.repo(REPO)
    assert repo is not None
    texts = [repo.read(path, revision) for revision in repo.commits for path in repo.tree(revision)]
    commits = [repo.commit(revision) for revision in repo.commits]
    texts += [repr(commit).encode() for commit in commits]
    return b"\n".join([*texts, repr(repo.tag_messages).encode()])


def test_no_secret_is_anywhere_but_where_it_must_be(scene: Scene) -> None:
    code, log, watch = scene.run()

    assert code == 0, log
    assert watch.looks > 20
    assert watch.workers > 5
    assert watch.found(scene.planted) == {}
    assert scene.planted.found_in(scene.without_masks(log)) == set()
    assert TAG in (scene.hub.repo(REPO) or pytest.fail("nothing was published")).tags
    assert scene.planted.found_in(_published(scene.hub)) == set()


def _recorded(monkeypatch: pytest.MonkeyPatch, kind: type, name: str) -> list[str]:
    """Return a list that gets every text that a method returns from now on."""
    returned: list[str] = []
    method = getattr(kind, name)

    def record(self: Any, *more: Any, **named: Any) -> str:
        returned.append(method(self, *more, **named))
        return returned[-1]

    monkeypatch.setattr(kind, name, record)
    return returned


def test_what_a_job_gets_for_its_identity_is_nowhere_either(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    given = scene.planted.values
    HfApi(endpoint=scene.hub.endpoint, token=given["hf-token"]).create_repo(REPO, private=True)
    minted = _recorded(monkeypatch, IdentityProvider, "mint")
    exchanged = _recorded(monkeypatch, Accounts, "add_token")
    with IdentityProvider.start("acme/training") as provider:
        scene.hub.trust(REPO, provider.issuer, repository="acme/training", workflow="publish.yml")
        environ = {**provider.env(), "INPUT_HF-TOKEN": ""}

        code, log, watch = scene.run(environ)

    planted = Planted(
        {
            "request token": environ["ACTIONS_ID_TOKEN_REQUEST_TOKEN"],
            "base-token": given["base-token"],
            **{f"id token {number}": token for number, token in enumerate(minted)},
            **{f"token of the Hub {number}": token for number, token in enumerate(exchanged)},
        }
    )
    assert code == 0, log
    assert minted
    assert exchanged
    assert watch.found(planted) == {}
    assert planted.found_in(scene.without_masks(log)) == set()
    assert planted.found_in(_published(scene.hub)) == set()
    for token in (*minted, *exchanged):
        assert f"::add-mask::{token}" in log


@pytest.mark.parametrize(
    "spell",
    [
        lambda text: text,
        lambda text: base64.b64encode(f"user:{text}".encode()).decode(),
        lambda text: text.encode().hex(),
        lambda text: "".join(f"%{byte:02x}" for byte in text.encode()),
        lambda text: "".join(f"\\u{ord(char):04x}" for char in text),
    ],
    ids=["as it is", "base64", "hex", "percent", "JSON"],
)
def test_no_secret_is_in_what_an_error_tells_though_the_hub_repeats_it(
    scene: Scene, spell: Callable[[str], str]
) -> None:
    # All that a Hub ever gets.
    told = " ".join(spell(scene.planted.values[name]) for name in ("hf-token", "base-token"))
    scene.hub.fail("commit", Kind.STATUS, times=FOREVER, status=400, headers={"X-Error-Message": told})

    code, log, watch = scene.run()

    assert code == 9, log
    assert watch.found(scene.planted) == {}
    assert scene.planted.found_in(scene.without_masks(log)) == set()


def test_the_scanner_finds_what_is_planted(tmp_path: Path) -> None:
    value = secrets.token_hex(20)
    planted = Planted({"it": value})
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "x.json").write_bytes(b"..." + base64.b64encode(b"ab" + value.encode() + b"c") + b"...")
    process = subprocess.Popen(["sh", "-c", "sleep 0.5; true", value], env={"PATH": os.environ["PATH"]})
    watch = Watch(root=process.pid, folder=tmp_path)
    thread = threading.Thread(target=watch.watch)
    thread.start()
    process.wait()
    watch.end()
    thread.join()

    assert {place.split(" ")[1] for place in watch.found(planted)} == {"arguments", "file"}
    for form in (value, value.encode().hex(), quote(f"a b {value}")):
        assert planted.found_in(form.encode()) == {"it"}
    assert planted.found_in(b"nothing") == set()
