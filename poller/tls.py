"""TLS on our side: whom to trust, and the certificate that says who we are."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final


class Unusable(ValueError):
    """A file that settings name for TLS cannot be used; the message is a sentence about it.

    Attributes:
        key: which of `verify_tls`, `client_cert`, `client_key` and `client_key_password` is wrong.
    """

    def __init__(self, key: str, sentence: str) -> None:
        super().__init__(sentence)
        self.key = key


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Our own certificate, for servers that want one.

    Attributes:
        cert: PEM file with the certificate, and perhaps those between it and its authority.
        key: PEM file with its private key; None if that is in the same file.
        password: opens the key, if it is encrypted.
    """

    cert: Path
    key: Path | None = None
    password: str | None = field(default=None, repr=False)


def context(verify: bool | Path = True, identity: Identity | None = None) -> ssl.SSLContext:
    """How to meet a server.

    Args:
        verify: True trusts the system's authorities, a path those of a CA bundle and no others,
            False anybody.
        identity: what is shown to a server that asks for a certificate.

    Raises:
        Unusable: a file cannot be read, or does not hold what it should.
    """
    try:
        made = ssl.create_default_context(cafile=verify if isinstance(verify, Path) else None)
    except OSError as error:
        raise Unusable("verify_tls", f"{verify}: {_why(error, 'no CA certificate')}") from error
    if verify is False:
        made.check_hostname = False
        made.verify_mode = ssl.CERT_NONE
    if identity is not None:
        _load(made, identity)
    return made


def check(identity: Identity) -> None:
    """Whether its files can be used.

    Raises:
        Unusable: as `context`.
    """
    _load(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), identity)


def _load(made: ssl.SSLContext, identity: Identity) -> None:
    cert, holder = identity.cert, identity.key or identity.cert
    encrypted = False

    def passphrase() -> str:
        nonlocal encrypted
        encrypted = True
        return identity.password or ""  # without an answer OpenSSL would ask on the terminal

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cert)
    except OSError as error:
        raise Unusable("client_cert", f"{cert}: {_why(error, 'no certificate')}") from error
    try:
        made.load_cert_chain(cert, identity.key, passphrase)
    except (OSError, ValueError) as error:
        key = "client_key" if identity.key else "client_cert"
        if getattr(error, "reason", None) == "KEY_VALUES_MISMATCH":
            problem = f"{holder}: the key does not belong to the certificate in {cert}"
        elif encrypted:
            key = "client_key_password"
            wrong = "does not open" if identity.password else "missing: encrypted is"
            problem = f"{wrong} the key in {holder}"
        else:
            problem = f"{holder}: {_why(error, 'no private key')}"
        raise Unusable(key, problem) from error


def _why(error: Exception, lacks: str) -> str:
    if isinstance(error, OSError) and not isinstance(error, ssl.SSLError):
        return str(error.strerror)
    return f"{lacks} in it"


def refusal(error: BaseException | None) -> str | None:
    """What a server says about our certificate by an alert, and what to do; None if nothing."""
    reason = str(getattr(error, "reason", ""))
    return next((said for alert, said in _ALERTS.items() if alert in reason), None)


_ALERTS: Final[Mapping[str, str]] = {
    "ALERT_CERTIFICATE_REQUIRED": "it wants a client certificate: set client_cert",
    "ALERT_HANDSHAKE_FAILURE": "it ends the handshake: does it want a client certificate "
    "(client_cert)?",
    "ALERT_UNKNOWN_CA": "it does not trust the authority of client_cert",
    "ALERT_CERTIFICATE_EXPIRED": "client_cert has expired: renew it",
    "ALERT_CERTIFICATE_REVOKED": "client_cert has been revoked: have another issued",
    "ALERT_CERTIFICATE_UNKNOWN": "it does not accept client_cert",
    "ALERT_BAD_CERTIFICATE": "it does not accept client_cert",
    "ALERT_UNSUPPORTED_CERTIFICATE": "it does not accept client_cert: is it one for clients?",
    "ALERT_ACCESS_DENIED": "it does not admit the holder of client_cert",
}
"""Parts of OpenSSL's names of alerts."""
