"""What tables have in common: strictness, and how they meet their server over TLS."""

from __future__ import annotations

from pathlib import Path
from typing import Self

import pydantic

from poller import tls
from poller.settings.values import Pem, Secret, Trust, has_tls


class Table(pydantic.BaseModel):
    """A table of settings.toml, frozen; it may hold no keys that its model lacks."""

    # by_name lets code build values by the attributes' names; `load` allows the keys only.
    model_config = pydantic.ConfigDict(
        frozen=True, extra="forbid", hide_input_in_errors=True, validate_by_name=True
    )


class Peer(Table):
    """What a table says about TLS with its server.

    Attributes:
        verify_tls: whether to verify the server's certificate, or a file of CA certificates.
        client_cert: our own certificate, for a server that wants one.
        client_key: its private key, if that is in a file of its own.
        client_key_password: opens the private key, if it is encrypted.
    """

    verify_tls: Trust = True
    client_cert: Pem | None = None
    client_key: Pem | None = None
    client_key_password: Secret | None = None

    @property
    def identity(self) -> tls.Identity | None:
        """Our own certificate, if there is one."""
        if self.client_cert is None:
            return None
        password = self.client_key_password
        return tls.Identity(
            cert=self.client_cert,
            key=self.client_key,
            password=password.get_secret_value() if password else None,
        )

    # Compared with the rest, so that a reload notices a certificate that was renewed in its place.
    _contents: tuple[bytes, ...] = pydantic.PrivateAttr(())

    @pydantic.model_validator(mode="after")
    def _take_files(self) -> Self:
        given = next((key for key in CLIENT_KEYS if getattr(self, key) is not None), None)
        url, identity = getattr(self, "url", None), self.identity
        if given and url is not None and not has_tls(url):
            raise tls.Unusable(given, "of no use with a url that is not https, rediss or mqtts")
        if identity is not None:
            tls.check(identity)
        elif given:
            raise tls.Unusable(given, "of no use without client_cert")
        files = (self.verify_tls, self.client_cert, self.client_key)
        self._contents = tuple(file.read_bytes() for file in files if isinstance(file, Path))
        return self


CLIENT_KEYS = ("client_cert", "client_key", "client_key_password")
"""The keys of a client certificate, which belong together."""
