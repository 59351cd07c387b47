"""Tokens without a secret: the job's own identity, exchanged at the Hub for a token of one repository.

GitHub gives an id token to a job that may ask for one (`permissions: id-token: write`); the Hub takes it from workflows
that the repository lists as trusted publishers (RFC 8693). The token is made when it is first needed, told to the
masker before anything else sees it, renewed before it expires, and kept in memory only.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

from runner.protocol.errors import AccessDenied, HubError
from runner.supervisor.hub.login import Given
from runner.supervisor.hub.translate import TRANSIENT, PassingError, clean
from runner.supervisor.hub.transport import Caller, Patience

GRANT_TYPE = "urn:ietf:params:oauth:grant-type:token-exchange"
ID_TOKEN_TYPE = "urn:ietf:params:oauth:token-type:id_token"  # noqa: S105 (a name of the protocol)
LONGEST_MARGIN_S = 600.0
DEFAULT_LIFETIME_S = 3600.0
MAX_RENEWALS = 5

# What OAuth (RFC 6749, RFC 8693) calls a refusal, and what it calls a fault that passes. The Hub answers
# `invalid_grant` for its own time-outs too ("This operation was aborted"); there, only the description tells.
_REFUSED = frozenset({"invalid_grant", "invalid_client", "unauthorized_client", "access_denied", "invalid_target"})
_PASSING = frozenset({"server_error", "temporarily_unavailable", "slow_down"})
_PASSING_WORDS = re.compile(
    r"abort|time[d -]?\s?out|too many|rate.?limit|temporar|try again|unavailable|overload|internal (?:server )?error"
    r"|fetch|cannot be reached|network|socket|connection|\bE(?:CONN[A-Z]+|TIMEDOUT|AI_AGAIN|PIPE)\b",
    re.IGNORECASE,
)


class Keyless:
    """The login of a trusted publisher; see `Login`. Safe to use from several threads."""

    is_keyless = True

    def __init__(
        self,
        *,
        endpoint: str,
        repo_id: str,
        identity_url: str,
        identity_token: str,
        on_secret: Callable[[str], None],
        patience: Patience | None = None,
        say: Callable[[str], None] = lambda _line: None,
    ) -> None:
        """Take what a token is asked for with; nothing is requested yet.

        Args:
            endpoint: address of the Hub, for which the id token is made.
            repo_id: `owner/name`, which the token is to be good for.
            identity_url: of GitHub's service for id tokens.
            identity_token: what the job shows there.
            on_secret: told every token before it is used, so that no log shows it.
            patience: how long failing calls are repeated.
            say: told of long waits.
        """
        self._endpoint, self._repo_id = endpoint, repo_id
        self._url, self._identity = identity_url, identity_token
        self._on_secret = on_secret
        self._secrets = [identity_token]
        self._caller = Caller(login=self._seen(), patience=patience or Patience(), say=say)
        self._lock = threading.Lock()
        self._token: str | None = None
        self._renew_at_s = 0.0
        self._renewals_left = MAX_RENEWALS

    @property
    def secrets(self) -> tuple[str, ...]:
        """Every token so far, and what they were asked for with."""
        return tuple(self._secrets)

    def token(self) -> str:
        """Return a token that is good for a while.

        Raises:
            AccessDenied: GitHub or the Hub refused to give one.
            HubError: they could not be reached.
        """
        with self._lock:
            if self._token is None or time.monotonic() >= self._renew_at_s:
                self._token = self._exchange(self._id_token())
            return self._token

    def forget(self) -> None:
        """Make the next token a new one."""
        with self._lock:
            self._token = None

    def renew(self) -> bool:
        """Forget a token that the Hub refused; False when that was done too often."""
        self._renewals_left -= 1
        self.forget()
        return self._renewals_left >= 0

    def _seen(self) -> Given:
        keyless = self

        class Watched(Given):
            @property
            def secrets(self) -> tuple[str, ...]:
                return keyless.secrets

        return Watched(None)

    def _keep_secret(self, text: str) -> None:
        self._secrets.append(text)
        self._on_secret(text)

    def _id_token(self) -> str:
        from huggingface_hub.utils import get_session, hf_raise_for_status

        joint = "&" if "?" in self._url else "?"
        url = f"{self._url}{joint}audience={quote(self._endpoint, safe='')}"

        def ask() -> Any:
            answer = get_session().get(url, headers={"Authorization": f"Bearer {self._identity}"})
            if answer.status_code in TRANSIENT:
                raise PassingError(f"GitHub answered {answer.status_code}", answer)
            if answer.status_code in (400, 401, 403, 404):
                raise AccessDenied(
                    f"GitHub gave this job no id token: it answered {answer.status_code}.",
                    why="Without `hf-token`, the job proves with it which workflow it is.",
                    fix="Give the job `permissions: { id-token: write }`, or set `hf-token`.",
                )
            hf_raise_for_status(answer)
            return answer.json()

        return self._taken(self._caller.read("get an id token from GitHub", ask), "value", "GitHub")

    def _exchange(self, id_token: str) -> str:
        from huggingface_hub.utils import get_session, hf_raise_for_status

        wanted = {
            "grant_type": GRANT_TYPE,
            "subject_token_type": ID_TOKEN_TYPE,
            "subject_token": id_token,
            "resource": self._repo_id,
        }

        def ask() -> Any:
            answer = get_session().post(f"{self._endpoint}/oauth/token", json=wanted)
            if 400 <= answer.status_code < 500 and answer.status_code not in TRANSIENT:
                raise self._refused(answer)
            hf_raise_for_status(answer)
            return answer.json()

        told = self._caller.read(f"get a token for {self._repo_id}", ask)
        token = self._taken(told, "access_token", "The Hub")
        lifetime_s = told.get("expires_in")
        if not isinstance(lifetime_s, int | float) or lifetime_s <= 0:
            lifetime_s = DEFAULT_LIFETIME_S
        self._renew_at_s = time.monotonic() + lifetime_s - min(LONGEST_MARGIN_S, lifetime_s / 4)
        return token

    def _taken(self, told: Any, name: str, who: str) -> str:
        token = told.get(name) if isinstance(told, dict) else None
        if not isinstance(token, str) or not token:
            raise HubError(
                f"{who} answered without a token.",
                why=f"The answer has no `{name}`.",
                fix="Set `hf-token`, and check `hub-endpoint`.",
            )
        self._keep_secret(token)
        return token

    def _refused(self, answer: Any) -> Exception:
        """Return the error for an answer with a 4xx: one that may pass, a refusal, or no answer of a Hub."""
        code, said = _oauth_error(answer)
        reason = clean(said or code, self.secrets)
        told = f"answered {answer.status_code}" + (f" ({reason})" if reason else "")
        if code in _PASSING or _PASSING_WORDS.search(said):
            return PassingError(f"the Hub {told}", answer)
        if code in _REFUSED or answer.status_code in (401, 403):
            return AccessDenied(
                f"The Hub gives this job no token for {self._repo_id}: it {told}.",
                why="Only a workflow that the repository lists among its trusted publishers gets one, and the "
                "repository must exist.",
                fix="On the Hub, under Settings, Trusted Publishers, add this GitHub repository, workflow and branch; "
                "or set `hf-token`.",
            )
        return HubError(
            f"The Hub made no token for {self._repo_id}: it {told}.",
            why="It does not take a job's identity for a token, or `hub-endpoint` is not a Hub.",
            fix="Set `hf-token`, and check `hub-endpoint`.",
        )


def _oauth_error(answer: Any) -> tuple[str, str]:
    """Return `error` and `error_description` of an answer (RFC 6749), each "" where it has none."""
    try:
        told = answer.json()
    except ValueError:
        return "", ""
    if not isinstance(told, dict):
        return "", ""
    return str(told.get("error") or ""), str(told.get("error_description") or "")
