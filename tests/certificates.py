"""Certificates of an authority of our own, as files."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import trustme
from cryptography.hazmat.primitives import serialization

from poller.tls import Identity

EXPIRED = {
    "not_before": datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC),
    "not_after": datetime.datetime(2020, 2, 1, tzinfo=datetime.UTC),
}


def bundle(authority: trustme.CA, folder: Path, name: str = "ca.pem") -> Path:
    """The authority's own certificate."""
    path = folder / name
    authority.cert_pem.write_to_path(str(path))
    return path


def server_files(authority: trustme.CA, folder: Path, **dates: Any) -> tuple[Path, Path]:
    """Certificate and key of a server on 127.0.0.1."""
    issued = authority.issue_cert("127.0.0.1", **dates)
    cert, key = folder / "server.pem", folder / "server.key"
    issued.cert_chain_pems[0].write_to_path(str(cert))
    issued.private_key_pem.write_to_path(str(key))
    return cert, key


def client(
    authority: trustme.CA,
    folder: Path,
    *,
    password: str | None = None,
    together: bool = False,
    **dates: Any,
) -> Identity:
    """A client's certificate and key, in one file or two."""
    folder.mkdir(exist_ok=True)
    issued = authority.issue_cert("poller", **dates)
    key = issued.private_key_pem.bytes()
    if password is not None:
        key = serialization.load_pem_private_key(key, None).private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(password.encode()),
        )
    cert = issued.cert_chain_pems[0].bytes()
    (folder / "client.pem").write_bytes(cert + key if together else cert)
    if together:
        return Identity(cert=folder / "client.pem", password=password)
    (folder / "client.key").write_bytes(key)
    return Identity(cert=folder / "client.pem", key=folder / "client.key", password=password)
