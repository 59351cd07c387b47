"""Start and stop a local Hub, and look into it: what tests and the demo use."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import uvicorn

from tests.hub import gates
from tests.hub.accounts import Accounts, Role, Scope, Token
from tests.hub.app import App
from tests.hub.disk import Blobs
from tests.hub.faults import Fired, Kind, Rule
from tests.hub.publishers import Publisher
from tests.hub.repos import Repositories, Repository
from tests.hub.routes import ENDPOINTS
from tests.hub.state import Exchange, Limits, State
from tests.hub.view import RepoView, seed
from tests.hub.wire import Protocol
from tests.hub.xetstore import XetStore

_DEFAULT = Limits()


class LocalHub:
    """A running Hub on a loopback socket; use `start`, and `with` or `stop`.

    It runs in a thread, so it ends with the process that started it, however that ends. All state is under the root
    folder: a Hub that is started again on the same folder has the same accounts, repositories and blobs.

    Attributes:
        endpoint: URL for `HF_ENDPOINT`, for example `http://localhost:41234`.
        root: the folder.
    """

    def __init__(
        self, root: Path, limits: Limits, *, xet: bool, bind: str, port: int, api_host: str, blob_host: str
    ) -> None:
        self.root = root
        self._socket = _listening_socket(bind, port)
        port = self._socket.getsockname()[1]
        self.endpoint = f"http://{api_host}:{port}"
        blobs = Blobs(root=root / "blobs")
        self._state = State(
            accounts=Accounts(file=root / "accounts.json"),
            repos=Repositories(root=root / "repos"),
            blobs=blobs,
            xet=xet,
            xet_store=XetStore(root=root / "xet", blobs=blobs),
            limits=limits,
            endpoint=self.endpoint,
            blob_endpoint=f"http://{blob_host}:{port}",
            blob_host=blob_host,
        )
        config = uvicorn.Config(
            App(self._state),
            lifespan="off",
            access_log=False,
            log_level="error",  # a handler that breaks must be seen
            http=Protocol,
            ws="none",
            timeout_graceful_shutdown=1,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [self._socket]}, name="local-hub", daemon=True
        )

    @classmethod
    def start(
        cls,
        root: Path,
        *,
        limits: Limits = _DEFAULT,
        xet: bool = True,
        bind: str = "127.0.0.1",
        port: int = 0,
        api_host: str = "localhost",
        blob_host: str = "127.0.0.1",
    ) -> Self:
        """Return a Hub that answers already (connections queue from the moment the socket is open).

        Args:
            root: where everything is kept; made if absent.
            limits: sizes and rates at which it changes its behaviour.
            xet: whether clients may use the Xet protocol; else only LFS.
            bind: address to listen on.
            port: 0 for a free one.
            api_host: name under which clients reach the API.
            blob_host: name under which clients reach the blobs; must differ from `api_host`, because clients follow
                a redirect to the same host and then miss the headers of the file.
        """
        if api_host == blob_host:
            raise ValueError("the blob host must have another name than the API host")
        root.mkdir(parents=True, exist_ok=True)
        hub = cls(root, limits, xet=xet, bind=bind, port=port, api_host=api_host, blob_host=blob_host)
        hub._thread.start()
        return hub

    def stop(self) -> None:
        """Close all connections and end the thread; the folder stays."""
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def add_user(self, name: str) -> None:
        """Add a user."""
        self._state.accounts.add_user(name)

    def add_org(self, name: str, members: Mapping[str, str]) -> None:
        """Add an organisation with its members: user to role (read, contributor, write, admin)."""
        self._state.accounts.add_org(name, members)

    def add_token(
        self,
        user: str,
        role: Role = "write",
        scoped: Iterable[Scope] = (),
        *,
        reads_gated: bool = False,
        expires_in_s: float | None = None,
    ) -> str:
        """Return a new token.

        Args:
            user: whose.
            role: read, write or fineGrained.
            scoped: for fineGrained: (`model`, `user` or `org`; its name; permissions such as `repo.write`,
                `repo.content.read` and `discussion.write`).
            reads_gated: for fineGrained: whether it may read gated repositories that its user has access to.
            expires_in_s: how long it is valid; None for ever.
        """
        expires_s = None if expires_in_s is None else time.time() + expires_in_s
        token = Token(user=user, role=role, scoped=tuple(scoped), reads_gated=reads_gated, expires_s=expires_s)
        return self._state.accounts.add_token(token)

    def revoke(self, token: str) -> None:
        """Make a token unknown."""
        self._state.accounts.revoke(token)

    def add_model(self, repo_id: str, folder: Path, *, private: bool = False) -> str:
        """Make a repository of the files of a folder, without a client; return the commit that holds them.

        Its owner is added as a user where no account has that name.
        """
        owner = repo_id.partition("/")[0]
        if owner not in self._state.accounts.orgs:
            self.add_user(owner)
        return seed(self._state, repo_id, folder, private=private)

    def gate(self, repo_id: str, *, mode: Literal["", "auto", "manual"] = "manual") -> None:
        """Let only members and accepted users download from a repository; '' opens it again."""
        repo = self._repository(repo_id)
        repo.state.gated = mode
        repo.save()

    def ask_access(self, repo_id: str, user: str) -> str:
        """Let a user ask for access to a gated repository, as on its page; return `accepted` or `pending`."""
        return gates.ask(self._repository(repo_id), user)

    def trust(self, resource: str, issuer: str, **claims: str) -> None:
        """Let jobs with these claims get a token: to write to a repository, or to read what a user may.

        Args:
            resource: `owner/name`, or a user name.
            issuer: address of the identity provider.
            claims: such as `repository`, `branch` and `workflow`; each must be equal.
        """
        self._state.publishers.append(Publisher(resource=resource, issuer=issuer, claims=claims))

    def limit_storage(self, namespace: str, size_bytes: int) -> None:
        """Limit what the large files of a user or organisation may take together."""
        self._state.storage_bytes[namespace] = size_bytes

    def protect(self, repo_id: str, *patterns: str) -> None:
        """Forbid changes of references: patterns of full names, such as `refs/tags/v*`; none lifts it."""
        repo = self._repository(repo_id)
        repo.state.protected = list(patterns)
        repo.save()

    def _repository(self, repo_id: str) -> Repository:
        repo = self._state.repos.get(repo_id)
        if repo is None:
            raise KeyError(repo_id)
        return repo

    def repo(self, repo_id: str) -> RepoView | None:
        """Return what the server holds of a repository, None if it does not exist."""
        repo = self._state.repos.get(repo_id)
        return None if repo is None else RepoView(_repo=repo, _blobs=self._state.blobs)

    def inject(self, *rules: Rule) -> None:
        """Make calls fail; see `Rule`."""
        for rule in rules:
            if not any(fnmatch(name, rule.endpoint) for name in ENDPOINTS):
                raise ValueError(f"no endpoint is called {rule.endpoint!r}")
            self._state.faults.add(rule)

    def fail(self, endpoint: str, kind: Kind = Kind.STATUS, **more: Any) -> None:
        """Make the next call of an endpoint fail: `inject` with one rule; `more` are its other attributes."""
        self.inject(Rule(endpoint=endpoint, kind=kind, **more))

    def fired(self) -> list[Fired]:
        """Return which calls failed on demand, in their order."""
        return self._state.faults.fired()

    def heal(self) -> None:
        """Forget all rules; what expired stays expired."""
        self._state.faults.clear()

    def exchanges(self) -> list[Exchange]:
        """Return all exchanges so far, in the order of their answers."""
        return list(self._state.log)

    def requests(self) -> list[tuple[str, str]]:
        """Return (method, raw path) of all requests so far, to the blob host too."""
        return [(exchange.method, exchange.path) for exchange in self._state.log]

    def forget_requests(self) -> None:
        """Empty the log."""
        self._state.log.clear()

    def env(self, token: str | None = None, *, home: Path | None = None, xet: bool = False) -> dict[str, str]:
        """Return what a client process needs in its environment.

        Args:
            token: for `HF_TOKEN`; None leaves it out.
            home: for `HF_HOME`, which should be fresh for each test; None leaves it out.
            xet: whether the client uses Xet where it can.
        """
        env = {
            "HF_ENDPOINT": self.endpoint,
            "HF_HUB_DISABLE_XET": "0" if xet else "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "localhost,127.0.0.1",
        }
        if token is not None:
            env["HF_TOKEN"] = token
        if home is not None:
            env["HF_HOME"] = str(home)
        return env


def _listening_socket(bind: str, port: int) -> socket.socket:
    # asyncio turns Nagle's algorithm off only where the protocol number is given, which `create_server` does not do;
    # without it each answer on a kept connection waits 40 ms for the client's delayed acknowledgement.
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.bind((bind, port))
    listening.listen(128)
    return listening
