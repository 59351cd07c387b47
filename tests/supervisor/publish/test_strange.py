"""What answers like a Hub and is none, or says what cannot be: named, and nothing is made of it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import SafetensorsFileMetadata, TensorInfo

from runner.protocol.errors import BrokenCheckpoint, HubError, HubUnavailable, PublishError
from runner.supervisor.hub import Given, Keyless, connect
from runner.supervisor.hub.headers_only import write_stand_in
from runner.supervisor.hub.translate import translate
from runner.supervisor.inputs.read import RepoRef
from runner.supervisor.publish.destination import FolderDestination
from tests.hub.identity import IdentityProvider
from tests.supervisor.publish.test_folder import Shelf
from tests.supervisor.publish.world import PATIENCE, REPO, make_folder, origin


@contextmanager
def answering(answers: Mapping[str, Any]) -> Iterator[str]:
    """Yield the address of a server that gives these answers: path up to "?" → JSON, and {} for any other path."""

    class Strange(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = json.dumps(answers.get(self.path.partition("?")[0], {})).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            self.do_GET()

        def log_message(self, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Strange) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_commit_that_is_none_is_an_error() -> None:
    with answering({f"/api/models/{REPO}": {"id": REPO, "sha": "main"}}) as endpoint:
        hub = connect(endpoint, login=Given("hf_a"), timeout_s=5.0, patience=PATIENCE)
        with pytest.raises(HubError, match="'main' is not a commit"):
            hub.resolve(RepoRef(repo_id=REPO))


def test_a_whoami_that_is_no_object_is_an_error() -> None:
    with answering({"/api/whoami-v2": ["alice"]}) as endpoint:
        hub = connect(endpoint, login=Given("hf_a"), timeout_s=5.0, patience=PATIENCE)
        with pytest.raises(HubError, match="whoami is not a JSON object"):
            hub.inspect_target(REPO, "v1.0.0")


def test_an_exchange_that_gives_no_token_is_an_error() -> None:
    with IdentityProvider.start("acme/training", ref="refs/tags/v1.0.0") as provider, answering({}) as endpoint:
        told = provider.env()
        login = Keyless(
            endpoint=endpoint, repo_id=REPO, identity_url=told["ACTIONS_ID_TOKEN_REQUEST_URL"],
            identity_token=told["ACTIONS_ID_TOKEN_REQUEST_TOKEN"], on_secret=lambda _secret: None, patience=PATIENCE,
        )  # fmt: skip
        with pytest.raises(HubError, match="answered without a token"):
            login.token()


def test_a_header_that_contradicts_its_file_is_an_error(tmp_path: Path) -> None:
    tensor = TensorInfo(dtype="F32", shape=[4], data_offsets=(0, 16))
    header = SafetensorsFileMetadata(metadata={}, tensors={"a": tensor})
    with pytest.raises(BrokenCheckpoint, match="announces 16 bytes of tensors and is 20 bytes long"):
        write_stand_in(tmp_path / "model.safetensors", header, 20)


def test_a_client_that_is_offline_is_named() -> None:
    error = translate(OfflineModeIsEnabled("offline"), doing="read it", secrets=())
    assert isinstance(error, HubUnavailable)
    assert "the client is offline" in error.problem.what


def test_a_folder_that_becomes_a_file_during_the_run_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setattr(FolderDestination, "inspect", lambda *_: None)  # it was a folder then
    with pytest.raises(PublishError, match="could not be written to"):
        Shelf(
            root=tmp_path / "file" / "models", folder=make_folder(tmp_path / "merged"), origin=origin(), lines=[]
        ).publish()
