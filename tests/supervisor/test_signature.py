"""The signing key is read or refused without being shown; the signature covers what it is given, and lies nowhere."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from runner.protocol.errors import InputError
from runner.supervisor.signature import read_signing_key, sign


def pem_of(key: Any, password: bytes | None = None) -> str:
    sealed: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if password is not None:
        sealed = serialization.BestAvailableEncryption(password)
    pem: bytes = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, sealed)
    return pem.decode()


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()], ids=lambda curve: curve.name)
def test_the_statement_names_every_file_and_not_the_signature(curve: ec.EllipticCurve) -> None:
    key = read_signing_key(pem_of(ec.generate_private_key(curve)))
    bundle = json.loads(sign(key, name="a/b", digests={"b": "b" * 64, "a/c": "a" * 64}, signature_path="model.sig"))

    assert bundle["verificationMaterial"]["publicKey"]["hint"] == key.fingerprint
    statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    assert statement["predicate"]["resources"] == [
        {"name": "a/c", "algorithm": "sha256", "digest": "a" * 64},
        {"name": "b", "algorithm": "sha256", "digest": "b" * 64},
    ]
    assert statement["predicate"]["serialization"]["ignore_paths"] == ["model.sig"]


def test_nothing_of_the_key_is_written_to_a_disk_or_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    pem = pem_of(ec.generate_private_key(ec.SECP256R1()))
    key = read_signing_key(pem)
    sign(key, name="a/b", digests={"b": "b" * 64}, signature_path="model.sig")

    assert list(tmp_path.iterdir()) == []
    assert pem.splitlines()[1] not in repr(key)
    descriptors = [path for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    assert not [path for path in descriptors if str(path.readlink()).startswith("/memfd:key")]


@pytest.mark.parametrize(
    "pem, why",
    [
        ("no key", "not a private key in PEM form"),
        ("-----BEGIN PRIVATE KEY-----\nc2VjcmV0c2VjcmV0\n-----END PRIVATE KEY-----\n", "not a private key in PEM form"),
        (pem_of(ec.generate_private_key(ec.SECP256R1()), b"secret"), "protected by a password"),
        (pem_of(ec.generate_private_key(ec.SECP256K1())), "of another kind (secp256k1)"),
        (pem_of(ed25519.Ed25519PrivateKey.generate()), "of another kind (Ed25519PrivateKey)"),
        (pem_of(rsa.generate_private_key(65537, 2048)), "of another kind (RSAPrivateKey)"),
    ],
    ids=["text", "broken", "password", "curve", "ed25519", "rsa"],
)
def test_what_cannot_sign_is_refused_without_being_repeated(pem: str, why: str) -> None:
    with pytest.raises(InputError) as caught:
        read_signing_key(pem)
    assert why in str(caught.value)
    assert not [line for line in pem.splitlines() if line in str(caught.value)]
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
