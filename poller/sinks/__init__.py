"""Where events go: the protocol of a sink, and one file per broker.

A sink delivers and says how far it came; retrying, backoff, batching and order are the relay's.
"""

from __future__ import annotations

import errno
import socket
import ssl
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Final, Protocol

from poller import tls
from poller.errors import SettingsError
from poller.events import Recorded


class Connection(Protocol):
    """An open way to a broker, used by one task; of no more use after `SinkUnavailable`."""

    @property
    def expired(self) -> Sequence[Recorded]:
        """Which events the last `send`, even a failed one, passed over, counted as delivered.

        They are older than the broker is to keep any.
        """

    async def cursors(self, sources: Sequence[str]) -> Mapping[str, int] | None:
        """What the broker itself remembers as delivered: source → journal offset, 0 for nothing.

        None if it remembers nothing, so that the journal's own cursor counts.

        Raises:
            SinkUnavailable: the broker is away or refuses.
        """

    async def send(self, batch: Sequence[Recorded]) -> int:
        """Deliver events of any sources, in journal order; an empty batch asks for a sign of life.

        Returns:
            How many from the batch's start are delivered for sure: one at least, all where that
            does not take long.

        Raises:
            SinkUnavailable: the broker is away or refuses; the first `delivered` are delivered.
            EventRejected: the first `delivered` are delivered, the next one can never be.
        """


class Sink(Protocol):
    """A broker and how to reach it.

    Attributes:
        name: `redis` or `mqtt`.
    """

    name: str

    def connect(self) -> AbstractAsyncContextManager[Connection]:
        """Connect and sign in; leaving the context says goodbye.

        Raises:
            SinkUnavailable: in one sentence, what is wrong and what to do.
        """


def tls_context(name: str, verify: bool | Path, identity: tls.Identity | None) -> ssl.SSLContext:
    """How to meet the broker of this sink; see `tls.context`.

    Raises:
        SettingsError: a file cannot be used; the message begins with its settings key.
    """
    try:
        return tls.context(verify, identity)
    except tls.Unusable as error:
        raise SettingsError([f"{name}.{error.key}: {error}"]) from error


def trouble(error: BaseException) -> str | None:
    """What an error of the network, possibly deep in the chain, means to who set the address.

    None if there is no network error in the chain.
    """
    link: BaseException | None = error
    while link is not None and not isinstance(link, OSError):
        link = link.__cause__ or link.__context__
    if link is None:
        return None
    # a name with several addresses gives one error for all of them, without a number
    refused = f"[Errno {errno.ECONNREFUSED}]" in str(link)
    kind = ConnectionRefusedError if refused else type(link)
    meaning = tls.refusal(link) or next(
        text for base, text in _MEANINGS.items() if issubclass(kind, base)
    )
    detail = getattr(link, "verify_message", None) or link.strerror or str(link)
    return f"{meaning} ({detail})" if detail else meaning


_MEANINGS: Final[Mapping[type[OSError], str]] = {
    ssl.SSLCertVerificationError: "its TLS certificate is not accepted: see verify_tls",
    ssl.SSLError: "TLS fails: does this port speak TLS?",
    socket.gaierror: "the host name is not found: is it spelled right?",
    ConnectionRefusedError: "nothing listens there: is the broker running, is the port right?",
    ConnectionResetError: "it closed the connection: is the port right, is TLS wanted or not, "
    "or a client certificate (client_cert)?",
    TimeoutError: "it does not answer: is a firewall in between, and is TLS wanted or not?",
    OSError: "the connection failed",
}
