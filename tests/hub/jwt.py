"""JSON Web Tokens signed with RS256 (RFC 7515, RFC 8017): enough for an identity provider in tests.

The keys are short, because they are made anew for each run; what is tested is that a signature is checked.
"""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_KEY_BITS = 1024
_EXPONENT = 65537
# DigestInfo of SHA-256, from RFC 8017, section 9.2.
_SHA256_INFO = bytes.fromhex("3031300d060960864801650304020105000420")


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """An RSA key.

    Attributes:
        modulus: product of two primes.
        private: the exponent that signs; 0 in the public half.
    """

    modulus: int
    private: int

    @classmethod
    def make(cls) -> Key:
        """Return a new key."""
        while True:
            first, second = _prime(_KEY_BITS // 2), _prime(_KEY_BITS // 2)
            order = (first - 1) * (second - 1)
            if first != second and order % _EXPONENT:
                return cls(modulus=first * second, private=pow(_EXPONENT, -1, order))

    @property
    def key_id(self) -> str:
        """What the key is called in a key set."""
        return hashlib.sha256(_bytes(self.modulus)).hexdigest()[:16]

    def jwk(self) -> dict[str, str]:
        """Return the public half as an entry of a key set (RFC 7517)."""
        public = {"n": _text(_bytes(self.modulus)), "e": _text(_bytes(_EXPONENT))}
        return {"kty": "RSA", "use": "sig", "alg": "RS256", "kid": self.key_id, **public}


def sign(claims: Mapping[str, Any], key: Key) -> str:
    """Return a token that holds `claims`."""
    header = {"typ": "JWT", "alg": "RS256", "kid": key.key_id}
    signed = f"{_text(json.dumps(header).encode())}.{_text(json.dumps(claims).encode())}"
    signature = pow(_padded(signed.encode(), key.modulus), key.private, key.modulus)
    return f"{signed}.{_text(signature.to_bytes(len(_bytes(key.modulus)), 'big'))}"


def claims_of(token: str) -> dict[str, Any]:
    """Return what a token says, without checking its signature; raises ValueError where it is no token."""
    parts = token.split(".")
    if len(parts) != 3:
        raise ValueError("no JSON Web Token")
    claims = json.loads(_raw(parts[1]))
    if not isinstance(claims, dict):
        raise ValueError("the claims are no object")
    return claims


def is_signed_by(token: str, keys: list[dict[str, str]]) -> bool:
    """Return whether one of the keys of a set has signed a token, with RS256."""
    signed, _, signature = token.rpartition(".")
    try:
        header = json.loads(_raw(signed.split(".")[0]))
        given = int.from_bytes(_raw(signature), "big")
        found = [key for key in keys if key["kid"] == header["kid"]]
    except (ValueError, KeyError, TypeError):
        return False
    if header.get("alg") != "RS256" or not found:
        return False
    modulus, exponent = (int.from_bytes(_raw(found[0][name]), "big") for name in ("n", "e"))
    return given < modulus and pow(given, exponent, modulus) == _padded(signed.encode(), modulus)


def _padded(message: bytes, modulus: int) -> int:
    info = _SHA256_INFO + hashlib.sha256(message).digest()
    fill = b"\xff" * (len(_bytes(modulus)) - len(info) - 3)
    return int.from_bytes(b"\0\1" + fill + b"\0" + info, "big")


def _prime(bits: int) -> int:
    while True:
        # The two highest bits are set, so that the product of two has twice the bits.
        number = secrets.randbits(bits) | 3 << (bits - 2) | 1
        if all(number % small for small in (3, 5, 7, 11, 13, 17, 19, 23, 29, 31)) and _is_prime(number):
            return number


def _is_prime(number: int) -> bool:
    """Miller and Rabin's test with 24 random bases."""
    odd, twos = number - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for _ in range(24):
        power = pow(secrets.randbelow(number - 3) + 2, odd, number)
        if power in (1, number - 1):
            continue
        for _ in range(twos - 1):
            power = power * power % number
            if power == number - 1:
                break
        else:
            return False
    return True


def _bytes(number: int) -> bytes:
    return number.to_bytes((number.bit_length() + 7) // 8, "big")


def _text(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def _raw(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
