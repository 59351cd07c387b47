"""A signed release, downloaded by the unmodified client, holds against the commands that its own card tells."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tests.acceptance.action import REPO, TAG, Ended, Stage, a_hub, commits, tags
from tests.hub.server import LocalHub
from tests.supervisor.test_signature import pem_of


@dataclass(frozen=True)
class Signed:
    """A signed release on a Hub, and the key that it is checked with."""

    stage: Stage
    hub: LocalHub
    token: str
    pem: str
    folder: Path
    ended: Ended

    def download(self, folder: Path) -> Path:
        """Download the release as the card tells, with the client's own program, and lay the public key beside it."""
        folder.mkdir()
        key = serialization.load_pem_private_key(self.pem.encode(), None)
        public = key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        (folder / "publisher.pub").write_bytes(public)
        assert self.check(folder, "hf download").returncode == 0
        return folder / "model"

    def card_commands(self) -> list[str]:
        """Return what the card tells to type."""
        repo = self.hub.repo(REPO)
        assert repo is not None
        (block,) = re.findall(r"```sh\n(.*?)\n```", repo.read("README.md", TAG).decode(), re.DOTALL)
        return str(block).replace("\\\n", " ").splitlines()

    def check(self, folder: Path, part: str) -> subprocess.CompletedProcess[str]:
        """Run the card's command that has `part` in it, in `folder`."""
        (command,) = [command for command in self.card_commands() if part in command]
        bin_folder = Path(sys.executable).parent
        environ = self.hub.env(self.token, home=folder / "home") | {"PATH": f"{bin_folder}:/usr/bin:/bin"}
        return subprocess.run(
            ["bash", "-c", command], cwd=folder, env=environ, capture_output=True, text=True, check=False
        )


@pytest.fixture(scope="module")
def signed(stage: Stage, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Signed]:
    folder = tmp_path_factory.mktemp("signed")
    pem = pem_of(ec.generate_private_key(ec.SECP256R1()))
    with a_hub(folder / "hub", existing=True) as (hub, token):
        ended = stage.run(hub, token, folder / "run", xet=False, environ={"INPUT_SIGNING-KEY": pem})
        assert ended.code == 0, ended.log
        yield Signed(stage=stage, hub=hub, token=token, pem=pem, folder=folder, ended=ended)


def test_the_downloaded_release_holds_against_the_commands_of_its_card(signed: Signed, tmp_path: Path) -> None:
    model = signed.download(tmp_path / "user")

    summed = signed.check(model.parent, "sha256sum")
    verified = signed.check(model.parent, "model_signing verify")

    assert summed.returncode == 0, summed.stderr
    assert verified.returncode == 0, verified.stdout + verified.stderr
    listed = {line.split("  ", 1)[1] for line in (model / "checksums.txt").read_text().splitlines()}
    present = {path.relative_to(model).as_posix() for path in model.rglob("*") if path.is_file()}
    ours = {path for path in present if not path.startswith(".")} - {"notes.md"}  # what the repository had before
    assert listed == ours - {"checksums.txt", "model.sig"}
    assert {"LICENSE", "README.md", "merge-manifest.json", "model.safetensors.index.json"} <= listed


@pytest.mark.parametrize("victim", ["model-00001-of-00002.safetensors", "README.md", "checksums.txt", "LICENSE"])
def test_a_changed_file_is_found(signed: Signed, tmp_path: Path, victim: str) -> None:
    model = signed.download(tmp_path / "user")
    with (model / victim).open("r+b") as file:
        file.seek(5)
        byte = file.read(1)
        file.seek(5)
        file.write(bytes([byte[0] ^ 1]))

    verified = signed.check(model.parent, "model_signing verify")

    assert verified.returncode != 0
    assert "mismatch" in (verified.stdout + verified.stderr).lower()
    assert signed.check(model.parent, "sha256sum").returncode != 0


def test_a_missing_file_and_another_key_are_found(signed: Signed, tmp_path: Path) -> None:
    model = signed.download(tmp_path / "user")
    content = (model / "config.json").read_bytes()
    (model / "config.json").unlink()
    assert signed.check(model.parent, "model_signing verify").returncode != 0

    (model / "config.json").write_bytes(content)
    assert signed.check(model.parent, "model_signing verify").returncode == 0
    other = ec.generate_private_key(ec.SECP256R1()).public_key()
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    (model.parent / "publisher.pub").write_bytes(other.public_bytes(serialization.Encoding.PEM, form))
    assert signed.check(model.parent, "model_signing verify").returncode != 0


def test_the_same_release_again_is_nothing_to_do_though_signatures_differ(signed: Signed) -> None:
    before = (commits(signed.hub), tags(signed.hub))

    again = signed.stage.run(
        signed.hub, signed.token, signed.folder / "again", xet=False, environ={"INPUT_SIGNING-KEY": signed.pem}
    )

    assert again.code == 0, again.log
    assert "nothing to do" in again.log
    path = signed.folder / "again" / again.report["outputs"]["checksums-path"]
    assert path.read_bytes() == (signed.folder / "run" / signed.ended.report["outputs"]["checksums-path"]).read_bytes()
    assert (commits(signed.hub), tags(signed.hub)) == before


def test_the_checksums_are_an_output_for_an_attestation(signed: Signed) -> None:
    path = signed.folder / "run" / signed.ended.report["outputs"]["checksums-path"]
    repo = signed.hub.repo(REPO)
    assert repo is not None
    assert path.read_bytes() == repo.read("checksums.txt", TAG)
    # What actions/attest takes as `subject-checksums`: a digest, two spaces, a name.
    assert all(re.fullmatch(r"[0-9a-f]{64}  \S+", line) for line in path.read_text().splitlines())


def test_the_card_names_the_key_and_how_to_get_the_bytes(signed: Signed) -> None:
    repo = signed.hub.repo(REPO)
    assert repo is not None
    card = repo.read("README.md", TAG).decode()
    fingerprint = json.loads(repo.read("merge-manifest.json", TAG))["signed_by"]
    assert f"<code>{fingerprint}</code>" in card
    assert shlex.split(signed.card_commands()[0])[:5] == ["hf", "download", REPO, "--revision", TAG]
