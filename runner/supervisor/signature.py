"""The OpenSSF model signature of a release: one file, `model.sig`, over the sha256 of all the others.

The key is a secret: it is held in memory, handed to the signing library through a file without a name (memfd), and
told in no message. The signature differs from run to run, as ECDSA signatures do; what it covers does not.
Covered: signing with a key. Not covered: Sigstore's keyless signing, which needs its public servers.
Source: the OpenSSF Model Signing specification 1.0; a Sigstore bundle with a DSSE envelope of an in-toto statement.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from runner.protocol.errors import InputError, Problem

CURVES = ("secp256r1", "secp384r1", "secp521r1")  # what the format has a place for
_MAKE_ONE = "Make one with `openssl ecparam -name prime256v1 -genkey -noout`, and store the whole text as a secret."


@dataclass(frozen=True, slots=True, kw_only=True)
class SigningKey:
    """A private key that was read and can sign.

    Attributes:
        pem: the key itself.
        fingerprint: sha256 of the public key in PEM form, 64 hex digits: what the signature names it by.
    """

    pem: str = field(repr=False)
    fingerprint: str


def read_signing_key(pem: str) -> SigningKey:
    """Return the key in `pem`: an ECDSA private key without a password.

    Raises:
        InputError: it is none. The text does not repeat any of it.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        key = serialization.load_pem_private_key(pem.encode(), password=None)
    except TypeError:
        raise _unusable(
            "It is protected by a password.", "Store it without one; the secret store protects it."
        ) from None
    except (ValueError, UnsupportedAlgorithm):  # their texts may quote the key
        raise _unusable("It is not a private key in PEM form, `-----BEGIN` line included.", _MAKE_ONE) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name not in CURVES:
        kind = key.curve.name if isinstance(key, ec.EllipticCurvePrivateKey) else type(key).__name__.lstrip("_")
        raise _unusable(f"It is a key of another kind ({kind}); model signatures take ECDSA on {CURVES}.", _MAKE_ONE)
    public = key.public_key().public_bytes(
        encoding=serialization.Encoding.PEM, format=serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return SigningKey(pem=pem, fingerprint=hashlib.sha256(public).hexdigest())


def sign(key: SigningKey, *, name: str, digests: Mapping[str, str], signature_path: str) -> bytes:
    """Return the signature: a Sigstore bundle, JSON.

    Args:
        key: signs.
        name: of the model; it is for people only.
        digests: path in the release → sha256, 64 hex digits; of every file but the signature.
        signature_path: where the signature will lie in the release; whoever verifies must not look for its digest.
    """
    from model_signing import hashing, manifest, signing

    kind = {"method": "files", "hash_type": "sha256", "allow_symlinks": False, "ignore_paths": [signature_path]}
    statement = manifest.Manifest(
        name,
        [
            manifest.FileManifestItem(path=PurePosixPath(path), digest=_digest(manifest, sha256))
            for path, sha256 in sorted(digests.items())
        ],
        manifest.SerializationType.from_args(kind),
    )

    class Known(hashing.Config):  # type: ignore[misc]  # its module is not followed
        """The digests that are known already: nothing is hashed, and no folder is needed."""

        def hash(self, model_path: object, *, files_to_hash: object = None) -> Any:
            return statement

    with tempfile.TemporaryDirectory() as folder, os.fdopen(os.memfd_create("key", os.MFD_CLOEXEC), "wb") as secret:
        secret.write(key.pem.encode())
        secret.flush()
        config = signing.Config().set_hashing_config(Known())
        config.use_elliptic_key_signer(private_key=Path(f"/proc/self/fd/{secret.fileno()}"))
        made = Path(folder) / "signature"
        config.sign(Path(name), made)
        return made.read_bytes()


def _digest(manifest: Any, sha256: str) -> Any:
    return manifest.hashing.Digest("sha256", bytes.fromhex(sha256))


def _unusable(why: str, fix: str) -> InputError:
    return InputError([Problem(what="The value of `signing-key` cannot sign.", why=why, fix=fix)])
