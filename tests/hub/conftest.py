"""A running Hub with one user, and the real client for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, HfApi, constants
from huggingface_hub.utils import _xet

from tests.hub.server import LocalHub
from tests.hub.state import Limits
from tests.hub.xetclient import use_xet

MULTIPART_FROM_BYTES = 1 << 20
PART_BYTES = 300_000
REPO = "alice/model"
CARD = b"---\nlicense: mit\nbase_model: acme/base\nbase_model_relation: finetune\ntags: [lora]\n---\n# Card\n"
FILES = {
    "README.md": CARD,
    "config.json": b'{"model_type": "llama"}',
    "model-00001.safetensors": bytes(range(256)) * 40,
    "model-00002.safetensors": bytes(reversed(range(256))) * 5000,
    "sub/folder/notes.txt": "ünïcode\n".encode(),
}
LARGE = "model-00002.safetensors"


def head_of(api: HfApi, branch: str = "main") -> str:
    refs = api.list_repo_refs(REPO)
    heads: dict[str, str] = {ref.name: ref.target_commit for ref in refs.branches}
    return heads[branch]


def commit_files(api: HfApi, files: dict[str, bytes], *, parent: str | None = None, branch: str = "main") -> str:
    operations = [CommitOperationAdd(path, content) for path, content in files.items()]
    made = api.create_commit(REPO, operations, commit_message="Release", parent_commit=parent, revision=branch)
    assert isinstance(made.oid, str)
    return made.oid


@pytest.fixture(autouse=True)
def _client_without_xet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # The client read these from the environment when it was imported, perhaps by another test.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LocalHub]:
    limits = Limits(multipart_threshold_bytes=MULTIPART_FROM_BYTES, part_size_bytes=PART_BYTES, page_entries=40)
    with LocalHub.start(tmp_path / "hub", limits=limits) as running:
        running.add_user("alice")
        yield running


@pytest.fixture
def client(hub: LocalHub) -> Callable[..., HfApi]:
    """Return a function that makes a client for a new token of a user."""

    def make(user: str, *args: object, **kwargs: object) -> HfApi:
        return HfApi(endpoint=hub.endpoint, token=hub.add_token(user, *args, **kwargs))  # type: ignore[arg-type]

    return make


@pytest.fixture
def alice(client: Callable[..., HfApi]) -> HfApi:
    return client("alice")


@pytest.fixture
def released(hub: LocalHub, alice: HfApi) -> str:
    """Return the commit that holds FILES."""
    alice.create_repo(REPO, private=True)
    return commit_files(alice, FILES)


@pytest.fixture
def fresh_client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[], None]]:
    """Turn Xet on; give a function that makes the client forget what it has sent and got, as on another machine."""
    homes = iter(range(100))

    def forget() -> None:
        use_xet(monkeypatch, tmp_path / f"home-{next(homes)}")

    forget()
    yield forget
    _xet.abort_xet_session()


@pytest.fixture
def repo(alice: HfApi) -> str:
    alice.create_repo(REPO, private=True)
    return REPO
