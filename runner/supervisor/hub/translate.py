"""Every exception of the Hub's client, as what, why and fix. No token and no signed URL gets into a text."""

from __future__ import annotations

import errno
import json
import re
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import lru_cache
from http import HTTPStatus
from typing import Any

from runner.protocol.errors import (
    AccessDenied,
    HubError,
    HubUnavailable,
    NotEnoughDisk,
    PublishConflict,
    RepoNotFound,
    RunnerError,
)
from runner.supervisor.masking import MASK, hide

MAX_SERVER_TEXT_CHARS = 300
TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504, 520, 522, 524})

_EXPIRED = frozenset({400, 403, 404})  # what storages answer to a signed URL that is too old
_FULL = re.compile(r"storage|quota|upgrade your plan", re.IGNORECASE)  # in the Hub's own words

_TOKENS = re.compile(r"\b(?:hf|api_org|hf_oauth|hf_jwt)_[A-Za-z0-9._-]{6,}|(?i:bearer)\s+\S+")
_URL_SECRETS = re.compile(r"(https?://)(?:[^/@\s]*@)?([^\s?#'\"<>]*)(?:[?#][^\s'\"<>]*)?")
# How hf_xet tells a refusal that it has not waited for; it renews an expired token of the storage itself.
_XET_REFUSAL = re.compile(r"HTTP status client error \((4(?!08|29)\d\d) ")
_XET_TOKEN = re.compile(r"/xet-(?:write|read)-token/")
_PARAMETER = re.compile(r";\s*([rtw])\s*=\s*(\d+)")
_UNPRINTABLE = re.compile(r"[^\x20-\x7e\u00a0-\uffff]+")


class PassingError(RuntimeError):
    """An answer that only its asker can read, and that says that a later attempt may succeed."""

    def __init__(self, answer: str, response: Any) -> None:
        """Take what to tell, such as "GitHub answered 503", and the response, whose headers may say when to ask."""
        super().__init__(answer)
        self.response = response


@lru_cache(maxsize=1)
def client_errors() -> tuple[type[Exception], ...]:
    """Return what a call of the client can raise, network, protocol, upload, cache and malformed answers included."""
    import httpx2
    from huggingface_hub import errors

    known = (httpx2.HTTPError, httpx2.InvalidURL, errors.EntryNotFoundError, errors.OIDCError, errors.XetDownloadError)
    return (*known, OSError, RuntimeError, ValueError, KeyError, TypeError)


def clean(text: object, secrets: tuple[str, ...] = ()) -> str:
    """Return `text` on one line, without tokens, credentials in URLs, and queries of URLs; at most 300 characters."""
    line = hide(str(text), secrets)
    line = _URL_SECRETS.sub(r"\1\2", _TOKENS.sub(MASK, line))
    line = " ".join(_UNPRINTABLE.sub(" ", line).split())
    return line if len(line) <= MAX_SERVER_TEXT_CHARS else line[: MAX_SERVER_TEXT_CHARS - 1] + "…"


def _quoted(text: object, secrets: tuple[str, ...]) -> str:
    """Return `text` as `clean` does, to stand in a sentence of ours, which has a full stop of its own."""
    return clean(text, secrets).rstrip(" .")


def pause_hint_s(error: BaseException) -> float | None:
    """Return the seconds that the Hub asked to wait, at least 0, or None where it did not ask.

    Source: `Retry-After`, in seconds or as a date (RFC 9110, section 10.2.3); else the field `RateLimit` of the draft
    draft-ietf-httpapi-ratelimit-headers, `"api";r=0;t=<seconds>`, where nothing remains (`r=0`) until the window ends
    (`t`). Where a 429 names neither, the longest window (`w`) of `RateLimit-Policy`, within which it must end.
    """
    response = getattr(_root(error), "response", None)
    if response is None:
        return None
    if (after_s := _retry_after_s(str(response.headers.get("retry-after", "")).strip())) is not None:
        return after_s
    windows = [dict(_PARAMETER.findall(item)) for item in str(response.headers.get("ratelimit", "")).split(",")]
    ends_s = [float(window["t"]) for window in windows if window.get("r") == "0" and "t" in window]
    if ends_s:
        return max(ends_s)
    policies = [dict(_PARAMETER.findall(item)) for item in str(response.headers.get("ratelimit-policy", "")).split(",")]
    lengths_s = [float(policy["w"]) for policy in policies if "w" in policy]
    is_limited = getattr(response, "status_code", None) == HTTPStatus.TOO_MANY_REQUESTS
    return max(lengths_s) if is_limited and lengths_s else None


def _retry_after_s(text: str) -> float | None:
    if text.isdigit():
        return float(text)
    try:
        until = parsedate_to_datetime(text)
    except ValueError:
        return None
    until = until if until.tzinfo else until.replace(tzinfo=UTC)
    return max(0.0, (until - datetime.now(UTC)).total_seconds())


def translate(error: BaseException, *, doing: str, secrets: tuple[str, ...]) -> RunnerError:
    """Return the error to raise instead of `error`.

    Args:
        error: one of `client_errors`.
        doing: what was being done, after "Could not ".
        secrets: texts that must not be shown.

    Returns:
        `HubUnavailable` where a later attempt may succeed, `PublishConflict` for 409 and 412, `AccessDenied`,
        `RepoNotFound`, `NotEnoughDisk`, else a plain `HubError`.
    """
    import httpx2
    from huggingface_hub import errors

    uploading = isinstance(error, RuntimeError) and error.__cause__ is not None
    error = _root(error)
    kind = error.__class__.__name__
    if isinstance(error, errors.HfHubHTTPError):
        return _from_status(error, doing, secrets, uploading=uploading)
    if isinstance(error, PassingError):
        return _unavailable(doing, _quoted(error, secrets), "It is busy, limits the rate of requests, or is down.")
    if isinstance(error, OSError):  # the client's offline and cache errors are of this family too
        return _from_os(error, doing, secrets)
    transient = (httpx2.HTTPError, httpx2.InvalidURL, RuntimeError, json.JSONDecodeError)
    if uploading or isinstance(error, transient):
        late = isinstance(error, httpx2.TimeoutException)
        what = "it did not answer in time" if late else "the connection or the transfer failed"
        return _unavailable(doing, what, f"{kind}: {_quoted(error, secrets)}.")
    return HubError(
        f"Could not {doing}: {kind}: {_quoted(error, secrets)}.",
        why="The Hub refused it, or answered in a form that its client does not understand.",
        fix="Read the message; if it is about the answer's form, check that the endpoint is a Hub.",
    )


def _root(error: BaseException) -> BaseException:
    """Return the error that the client wrapped: of an upload, or of a look-up that fell back to its cache."""
    from huggingface_hub import errors

    for _ in range(5):
        if not isinstance(error, (RuntimeError, errors.LocalEntryNotFoundError)) or error.__cause__ is None:
            break
        error = error.__cause__
    return error


def _from_status(error: Any, doing: str, secrets: tuple[str, ...], *, uploading: bool) -> RunnerError:
    status = int(error.response.status_code)
    said = _quoted(error.server_message or error.response.headers.get("x-error-message") or "", secrets)
    answer = f"the Hub answered {status}" + (f" ({said})" if said else "")
    hidden = _hidden(error, answer, doing, uploading=uploading)
    if hidden is not None:
        return hidden
    if status in TRANSIENT:
        return _unavailable(doing, answer, "It is busy, limits the rate of requests, or is down.")
    if status in (402, 403) and _FULL.search(said):
        return HubError(
            f"Could not {doing}: {answer}.",
            why="The storage of the namespace is full, or its plan does not allow more.",
            fix="Make room there, or ask its owner for a larger plan; then run again.",
        )
    if uploading and status in _EXPIRED:  # an upload's URL is signed and expires: a new attempt gets a new one
        return _unavailable(doing, answer, "The signed address has expired, or the storage refuses these bytes.")
    if status in (409, 412):
        return PublishConflict(
            f"Could not {doing}: {answer}.",
            why="Somebody else changed the repository at the same time, or the Hub showed an older state of it.",
            fix="Look at its newest commits, then run again.",
        )
    return _from_refusal(status, answer, doing)


def _hidden(error: Any, answer: str, doing: str, *, uploading: bool) -> RunnerError | None:
    """Return the error for what the token does not see; None for any other."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return AccessDenied(
            f"Could not {doing}: the repository is gated.",
            why=f"Its owner lets in only who accepted its terms; {answer}.",
            fix="Accept the terms on its page with the account of `base-token` (or of `hf-token`, without one).",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return RepoNotFound(
            f"Could not {doing}: there is no such revision.",
            why=f"The repository exists, but {answer}.",
            fix="Check the branch, tag or commit after `@` (or `base-revision`).",
        )
    if isinstance(error, errors.RepositoryNotFoundError) or (error.response.status_code == 404 and not uploading):
        return RepoNotFound(
            f"Could not {doing}: not found.",
            why=f"It does not exist, or this token may not see it; {answer}.",
            fix="Check the spelling `owner/name`, and that the token may read it if it is private.",
        )
    return None


def _from_refusal(status: int, answer: str, doing: str) -> RunnerError:
    if status == 401:
        return AccessDenied(
            f"Could not {doing}: the token is not accepted.",
            why=f"It is wrong, expired or revoked; {answer}.",
            fix="Make a new token at the Hub's settings page and store it as the secret that `hf-token` reads.",
        )
    if status == 403:
        return AccessDenied(
            f"Could not {doing}: this token may not.",
            why=f"It lacks a right; {answer}.",
            fix="Use a token that may write to the target (role write, or fine-grained with write on the repository).",
        )
    return HubError(
        f"Could not {doing}: {answer}.",
        why="The Hub refuses the request as it is: a quota, a size, or content that it does not take.",
        fix="Read the message; it is the Hub's own.",
    )


def _from_os(error: OSError, doing: str, secrets: tuple[str, ...]) -> RunnerError:
    from huggingface_hub import errors

    text = _quoted(error, secrets)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return HubUnavailable(
            f"Could not {doing}: the client is offline.",
            why="HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set.",
            fix="Unset it, or give local folders.",
        )
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NotEnoughDisk(
            f"Could not {doing}: the disk is full.",
            why="The file system of `cache-dir` has no room for the download.",
            fix="Free space, or point `cache-dir` and `work-dir` at a larger disk.",
        )
    if error.errno is None and isinstance(error, PermissionError):  # how hf_xet says 401 and 403
        return _from_refusal(403 if "403" in text else 401, text, doing)
    refused = _XET_REFUSAL.search(text)
    if error.errno is None and refused is not None:
        return _from_xet_refusal(refused[1], doing, of_hub=_XET_TOKEN.search(text) is not None)
    if error.errno is None or isinstance(error, ConnectionError):  # a wrong size, a failed transfer
        return _unavailable(doing, "the transfer failed", f"{error.__class__.__name__}: {text}.")
    return HubError(
        f"Could not {doing}: {error.__class__.__name__}: {_quoted(error.strerror, secrets)}.",
        why="A file of the cache or of the release could not be read or written.",
        fix="Check that `cache-dir` and `work-dir` are writable.",
    )


def _from_xet_refusal(status: str, doing: str, *, of_hub: bool) -> RunnerError:
    if of_hub:  # asked for a token of its storage
        return _from_refusal(int(status), f"the Hub answered {status} to the request for Xet storage", doing)
    return HubError(
        f"Could not {doing}: the Xet storage answered {status}.",
        why="It refuses these bytes: the storage of the namespace may be full, or the token may not write there.",
        fix="Look at the storage that is left and at the token's rights, then run again.",
    )


def _unavailable(doing: str, what: str, why: str) -> HubUnavailable:
    return HubUnavailable(
        f"Could not {doing}: {what}.",
        why=why,
        fix="Check the network and the Hub's status, then run again; what was uploaded is not sent twice.",
    )
