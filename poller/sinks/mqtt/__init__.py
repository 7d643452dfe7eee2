"""MQTT: every event to a topic of its own, the newest of each job retained.

QoS 1 with a window of messages in flight. A message is done at its acknowledgement; the broker
takes messages in the order in which they were sent, so no job's state comes before its event.
"""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final, Literal
from urllib.parse import quote, urlsplit

import aiomqtt
import orjson
from aiomqtt import ProtocolVersion

from poller.errors import EventRejected, SettingsError, SinkUnavailable
from poller.events import JOB_TYPE, Recorded
from poller.sinks import tls_context
from poller.sinks.mqtt.link import Link, Message, TlsSocket, code_of, wants_another_version
from poller.tls import Identity

WINDOW: Final = 50
KEEPALIVE_S: Final = 15
CONTENT_TYPE: Final = "application/cloudevents+json; charset=utf-8"

_MAX_TOPIC_BYTES: Final = 65_535
_MAX_HEAD_BYTES: Final = 128  # of a PUBLISH packet, without its topic
_MAX_EXPIRY_S: Final = 2**32 - 1
_GOODBYE_S: Final = 1.0
_AT_ONCE_S: Final = 1.0  # a slow broker is given no more than this takes, so that the cursor moves
_VERSIONS: Final[Mapping[str, tuple[ProtocolVersion, ...]]] = {
    "auto": (ProtocolVersion.V5, ProtocolVersion.V311),
    "5": (ProtocolVersion.V5,),
    "3.1.1": (ProtocolVersion.V311,),
}
# what is wrong with one message: malformed, protocol error, topic, size, payload format
_OF_ONE_MESSAGE: Final = frozenset({0x81, 0x82, 0x90, 0x95, 0x99})

_TO_ENCODE: Final = re.compile(r"[/+#%\x00-\x1f\x7f-\x9f]")
_UNFIT: Final = re.compile(
    "[\ud800-\udfff\ufdd0-\ufdef"
    + "".join(chr(plane << 16 | last) for plane in range(17) for last in (0xFFFE, 0xFFFF))
    + "]"
)


class MqttSink:
    """Publishes events to an MQTT broker.

    Args:
        url: `mqtt://host:port` or `mqtts://host:port` (TLS).
        instance: name of this poller; names the client and its topic of being online. None is a
            visitor: it tells nobody, and takes no daemon's place.
        version: of this program, for that topic.
        since: when this program began, for that topic.
        topic_prefix: first level or levels of every topic.
        username: if the broker wants one.
        password: likewise.
        state_expiry_s: how long the broker keeps the state of a job (MQTT 5).
        protocol: `auto` is MQTT 5, or 3.1.1 where the broker refuses that.
        verify_tls: True, False, or a CA bundle.
        identity: our own certificate, for a broker that wants one.
        timeout_s: for connecting, and between two acknowledgements.

    Raises:
        SettingsError: the URL, the CA bundle or the client certificate cannot be used.
    """

    name = "mqtt"

    def __init__(
        self,
        url: str,
        *,
        instance: str | None,
        version: str,
        since: str,
        topic_prefix: str = "jobs",
        username: str | None = None,
        password: str | None = None,
        state_expiry_s: float = 604_800,
        protocol: Literal["auto", "5", "3.1.1"] = "auto",
        verify_tls: bool | Path = True,
        identity: Identity | None = None,
        timeout_s: float = 4.0,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("mqtt", "mqtts") or not parts.hostname:
            raise SettingsError(["mqtt.url: must be mqtt://host:port or mqtts://host:port"])
        secure = parts.scheme == "mqtts"
        self._prefix = topic_prefix
        self._versions = _VERSIONS[protocol]
        self._presence = f"{topic_prefix}/_poller/{encoded(instance)}" if instance else None
        self._online = orjson.dumps({"online": True, "version": version, "since": since})
        self._offline = orjson.dumps({"online": False})
        self._expiry_s = min(int(state_expiry_s), _MAX_EXPIRY_S)
        self._suspicious = False
        self._options: dict[str, Any] = {
            "hostname": parts.hostname,
            "port": parts.port or (8883 if secure else 1883),
            "username": username,
            "password": password,
            "timeout": timeout_s,
            "keepalive": KEEPALIVE_S,
            "max_inflight_messages": 0,  # the window is kept here
            "socket_options": ((socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),),
        }
        if self._presence:
            self._options["identifier"] = f"poller-{instance}"
            self._options["will"] = aiomqtt.Will(self._presence, self._offline, qos=1, retain=True)
        if secure:
            context = tls_context(self.name, verify_tls, identity)
            context.sslsocket_class = TlsSocket
            self._options["tls_context"] = context

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[MqttConnection]:
        """Connect, sign in, and tell that this poller is online; offline when the context ends.

        Raises:
            SinkUnavailable: the broker is away or refuses.
        """
        link = await self._open(self._versions)
        connection = MqttConnection(link, self._prefix, self._expiry_s, self._suspicious)
        try:
            await self._tell(connection, self._online)
            try:
                yield connection
            finally:
                with suppress(SinkUnavailable, TimeoutError):
                    async with asyncio.timeout(_GOODBYE_S):
                        await self._tell(connection, self._offline)
        finally:
            self._suspicious = connection.suspicious
            await link.close()

    async def _tell(self, connection: MqttConnection, presence: bytes) -> None:
        if self._presence:
            await connection.tell(self._presence, presence)

    async def _open(self, versions: Sequence[ProtocolVersion]) -> Link:
        version, *others = versions
        link = Link(version, self._options)
        try:
            await link.open()
        except (aiomqtt.MqttError, UnicodeError) as error:
            if others and wants_another_version(error):
                return await self._open(others)
            sentence = link.explain(error, "it refuses the connection")
            raise SinkUnavailable(sentence) from error
        # first next time: some brokers answer what they do not know after a timeout only
        self._versions = (version, *(other for other in self._versions if other is not version))
        return link


class MqttConnection:
    """An open way to the broker.

    Attributes:
        suspicious: the broker ended a connection over one of several messages in flight, so they
            are sent one by one until it is found, or a batch has passed.
        expired: none: MQTT keeps no events.
    """

    expired: Sequence[Recorded] = ()

    def __init__(self, link: Link, prefix: str, expiry_s: int, suspicious: bool) -> None:
        self.suspicious = suspicious
        self._link = link
        self._prefix = prefix
        self._window = min(WINDOW, link.term("ReceiveMaximum", WINDOW))
        self._max_bytes = link.term("MaximumPacketSize", 1 << 28) - _MAX_HEAD_BYTES
        format_: dict[str, str | int] = {"ContentType": CONTENT_TYPE, "PayloadFormatIndicator": 1}
        self._as_news = link.properties(**format_)
        self._as_state = link.properties(**format_, MessageExpiryInterval=expiry_s)

    async def cursors(self, sources: Sequence[str]) -> None:
        """None: a broker does not tell what it was given."""

    async def send(self, batch: Sequence[Recorded]) -> int:
        """Publish events; an empty batch asks for a sign of life.

        The state of a job is published once, for its last event in the batch.

        Returns:
            How many have been acknowledged: all but where the broker is slow.

        Raises:
            SinkUnavailable: the broker is away or refuses.
            EventRejected: an event has a topic, a size or content that cannot be published.
        """
        messages, end, why = self._plan(batch)
        done = await self._publish(messages, end)
        self.suspicious = self.suspicious and not messages
        if why and done == end:
            raise EventRejected(why, end)
        return done

    async def tell(self, topic: str, body: bytes) -> None:
        """Publish one retained message.

        Raises:
            SinkUnavailable: the broker is away or refuses.
        """
        try:
            await self._publish([Message(0, topic, body, retain=True)], 1)
        except EventRejected as error:
            raise SinkUnavailable(str(error)) from error

    def _plan(self, batch: Sequence[Recorded]) -> tuple[list[Message], int, str | None]:
        """The messages of the events before the first impossible one; its place, and why it is."""
        bases: list[str] = []
        why = None
        for event in batch:
            base, why = self._base(event)
            if why:
                break
            bases.append(base)
        newest = {base: place for place, base in enumerate(bases)}
        messages: list[Message] = []
        for place, base in enumerate(bases):
            kind, body = batch[place].type, batch[place].body
            if not kind.startswith(JOB_TYPE):
                messages.append(Message(place, f"{base}/status", body, True, self._as_news))
                continue
            topic = f"{base}/events/{kind.removeprefix(JOB_TYPE)}"
            messages.append(Message(place, topic, body, False, self._as_news))
            if newest[base] == place:
                messages.append(Message(place, f"{base}/state", body, True, self._as_state))
        return messages, len(bases), why

    def _base(self, event: Recorded) -> tuple[str, str | None]:
        """How the event's topics begin, and why it cannot be published, if it cannot."""
        base = f"{self._prefix}/{event.source}"
        if not event.type.startswith(JOB_TYPE):
            return base, None
        base = f"{base}/{encoded(event.job_id)}"
        if _UNFIT.search(base):
            return base, "the job id has characters that MQTT brokers refuse in topics"
        topic_bytes = len(base.encode()) + len(f"/events/{event.type}")
        if topic_bytes > _MAX_TOPIC_BYTES:
            return base, "the job id is too long for a topic"
        if topic_bytes + len(event.body) > self._max_bytes:
            return base, "the event is larger than the broker takes"
        return base, None

    async def _publish(self, messages: Sequence[Message], end: int) -> int:
        """Publish and wait for every acknowledgement; `end` is the place after the last event.

        Gives the place after the last event that was published.
        """
        link, sent, loop = self._link, 0, asyncio.get_running_loop()
        enough_s = loop.time() + _AT_ONCE_S
        window = 1 if self.suspicious else self._window
        link.refused.clear()
        try:
            link.check()
            if not messages:
                link.ping(f"{self._prefix}/_poller")
            for message in messages:
                while len(link.unacknowledged) >= window:
                    await link.news()
                another = sent > 0 and message.place > messages[sent - 1].place
                if link.refused or (another and loop.time() > enough_s):
                    break
                link.put(message)
                sent += 1
            while link.unacknowledged:
                await link.news()
        except aiomqtt.MqttError as error:
            unsent = messages[sent].place if sent < len(messages) else end
            place = min({unsent, *link.unacknowledged.values()})
            was_suspicious = self.suspicious
            self.suspicious = code_of(error) in _OF_ONE_MESSAGE
            if self.suspicious and was_suspicious:
                raise EventRejected(link.explain(error, "it refuses the event"), place) from error
            sentence = link.explain(error, "it ended the connection")
            raise SinkUnavailable(sentence, place) from error
        if link.refused:
            place, reason = min(link.refused.items())
            kind = EventRejected if reason.value in _OF_ONE_MESSAGE else SinkUnavailable
            raise kind(link.explain(aiomqtt.MqttCodeError(reason), "it refuses the event"), place)
        return messages[sent].place if sent < len(messages) else end


def encoded(job_id: str) -> str:
    """A job id as one level of a topic."""
    return _TO_ENCODE.sub(lambda found: quote(found[0], safe=""), job_id)
