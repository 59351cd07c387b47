"""What the Hub answers when it says no: status, `X-Error-Code` and `X-Error-Message` as clients know them."""

from __future__ import annotations

from collections.abc import Mapping


class RefusedError(Exception):
    """A request that is answered with an error.

    Attributes:
        status: HTTP status.
        message: text of `X-Error-Message` and of the JSON body.
        code: `X-Error-Code`, or None where the Hub sends none.
        extra: more keys of the JSON body.
        headers: more response headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        extra: Mapping[str, object] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.extra = dict(extra or {})
        self.headers = dict(headers or {})


def wrong_token() -> RefusedError:
    """Return the answer to a token that the Hub does not know."""
    return RefusedError(401, "Invalid credentials in Authorization header")


def not_signed_in(*, code: str | None = None) -> RefusedError:
    """Return the answer to an anonymous request for something that is not public."""
    return RefusedError(401, "Invalid username or password.", code=code)


def repo_not_found() -> RefusedError:
    """Return the answer to a token for a repository that is absent, or that it may not see."""
    return RefusedError(404, "Repository not found", code="RepoNotFound")


def revision_not_found(revision: str) -> RefusedError:
    """Return the answer to an unknown branch, tag or commit."""
    return RefusedError(404, f"Invalid rev id: {revision}", code="RevisionNotFound")


def entry_not_found(path: str, commit: str) -> RefusedError:
    """Return the answer to a path that is not in the tree of `commit`."""
    message = f"{path} does not exist on this revision"
    return RefusedError(404, message, code="EntryNotFound", headers={"X-Repo-Commit": commit})


def bad_request(message: str) -> RefusedError:
    """Return the answer to a request that cannot be understood or carried out."""
    return RefusedError(400, message)


def forbidden(message: str) -> RefusedError:
    """Return the answer to a token that is known but lacks a right."""
    return RefusedError(403, message)


def storage_full() -> RefusedError:
    """Return the answer to a namespace that has no room left."""
    return RefusedError(403, "Private repository storage limit reached, please upgrade your plan to increase it.")
