"""MQTT: every event to a topic of its own, the newest of each job retained.

QoS 1 with a window of messages in flight. A message is done at its acknowledgement; the broker
takes messages in the order in which they were sent, so no job's state comes before its event.
"""

from __future__ import annotations

import asyncio
import logging
import re
import socket
import ssl
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple
from urllib.parse import quote, urlsplit

import aiomqtt
import orjson
from aiomqtt import ProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from poller.errors import EventRejected, SettingsError, SinkUnavailable
from poller.events import JOB_TYPE, Recorded
from poller.sinks import tls_context, trouble

WINDOW: Final = 50
KEEPALIVE_S: Final = 15
CONTENT_TYPE: Final = "application/cloudevents+json; charset=utf-8"

_MAX_TOPIC_BYTES: Final = 65_535
_MAX_HEAD_BYTES: Final = 128  # of a PUBLISH packet, without its topic
_MAX_EXPIRY_S: Final = 2**32 - 1
_GOODBYE_S: Final = 1.0
_TO_ENCODE: Final = re.compile(r"[/+#%\x00-\x1f\x7f-\x9f]")
_UNFIT: Final = re.compile(
    "[\ud800-\udfff\ufdd0-\ufdef"
    + "".join(chr(plane << 16 | last) for plane in range(17) for last in (0xFFFE, 0xFFFF))
    + "]"
)
_VERSIONS: Final = {
    "auto": (ProtocolVersion.V5, ProtocolVersion.V311),
    "5": (ProtocolVersion.V5,),
    "3.1.1": (ProtocolVersion.V311,),
}
_QUIET: Final = logging.Logger("paho", logging.CRITICAL + 1)  # what it logs, the errors say too
_ADVICE: Final = {
    0x84: "it does not speak this version of MQTT: see mqtt.protocol",
    0x86: "it refuses mqtt.username or mqtt.password",
    0x87: "allow the user what deploy/mosquitto.acl lists",
    0x8E: "another client took over: does another poller have the same poller.instance?",
}
# of a single message, as MQTT 5 tells them: malformed, protocol, topic name, size, payload format
_REJECTIONS: Final = frozenset({0x81, 0x82, 0x90, 0x95, 0x99})


class MqttSink:
    """Publishes events to an MQTT broker.

    Args:
        url: `mqtt://host:port` or `mqtts://host:port` (TLS).
        instance: name of this poller; names the client and its topic of being online.
        version: of this program, for that topic.
        since: when this program began, for that topic.
        topic_prefix: first level or levels of every topic.
        username: if the broker wants one.
        password: likewise.
        state_expiry_s: how long the broker keeps the state of a job (MQTT 5).
        protocol: `auto` is MQTT 5, or 3.1.1 where the broker refuses that.
        verify_tls: True, False, or a CA bundle.
        timeout_s: for connecting, and between two acknowledgements.

    Raises:
        SettingsError: the URL or the CA bundle cannot be used.
    """

    name = "mqtt"

    def __init__(
        self,
        url: str,
        *,
        instance: str,
        version: str,
        since: str,
        topic_prefix: str = "jobs",
        username: str | None = None,
        password: str | None = None,
        state_expiry_s: float = 604_800,
        protocol: Literal["auto", "5", "3.1.1"] = "auto",
        verify_tls: bool | Path = True,
        timeout_s: float = 4.0,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("mqtt", "mqtts") or not parts.hostname:
            raise SettingsError(["mqtt.url: must be mqtt://host:port or mqtts://host:port"])
        secure = parts.scheme == "mqtts"
        port = parts.port or (8883 if secure else 1883)
        self._where = f"{parts.hostname}:{port}"
        self._prefix = topic_prefix
        self._versions = _VERSIONS[protocol]
        self._presence = f"{topic_prefix}/_poller/{encoded(instance)}"
        self._online = orjson.dumps({"online": True, "version": version, "since": since})
        self._offline = orjson.dumps({"online": False})
        self._expiry_s = min(int(state_expiry_s), _MAX_EXPIRY_S)
        self._suspicious = False
        self._options: dict[str, Any] = {
            "hostname": parts.hostname,
            "port": port,
            "username": username,
            "password": password,
            "identifier": f"poller-{instance}",
            "timeout": timeout_s,
            "keepalive": KEEPALIVE_S,
            "will": aiomqtt.Will(self._presence, self._offline, qos=1, retain=True),
            "max_inflight_messages": 0,  # the window is kept here, and not by a search per message
            "socket_options": ((socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),),
            "logger": _QUIET,
        }
        if secure:
            context = tls_context(verify_tls, "mqtt.verify_tls")
            context.sslsocket_class = _TlsSocket
            self._options["tls_context"] = context

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[MqttConnection]:
        """Connect, sign in, and tell that this poller is online; offline when the context ends.

        Raises:
            SinkUnavailable: the broker is away, refuses, or lacks something that is needed.
        """
        link = await self._open()
        connection = MqttConnection(
            link,
            prefix=self._prefix,
            expiry_s=self._expiry_s,
            suspicious=self._suspicious,
        )
        try:
            await connection.tell(self._presence, self._online)
            try:
                yield connection
            finally:
                with suppress(SinkUnavailable, TimeoutError):
                    async with asyncio.timeout(_GOODBYE_S):
                        await connection.tell(self._presence, self._offline)
        finally:
            self._suspicious = connection.suspicious
            await link.close()

    async def _open(self) -> _Link:
        for version in self._versions:
            link = _Link(protocol=version, **self._options)
            try:
                await link.open()
            except (aiomqtt.MqttError, UnicodeError) as error:
                if version is not self._versions[-1] and _may_be_older(error):
                    continue
                sentence = link.explain(error, "it refuses the connection")
                raise SinkUnavailable(sentence) from error
            return link
        raise AssertionError(self._versions)


class MqttConnection:
    """An open way to the broker.

    Attributes:
        suspicious: the broker ended a connection over one of several messages in flight, so they
            are sent one by one until it is found, or a batch has passed.
    """

    def __init__(self, link: _Link, *, prefix: str, expiry_s: int, suspicious: bool) -> None:
        self.suspicious = suspicious
        self._link = link
        self._prefix = prefix
        self._window = min(WINDOW, link.term("ReceiveMaximum", WINDOW))
        self._max_bytes = link.term("MaximumPacketSize", 1 << 28) - _MAX_HEAD_BYTES
        self._as_news = link.properties()
        self._as_state = link.properties(MessageExpiryInterval=expiry_s)

    async def cursors(self, sources: Sequence[str]) -> None:
        """None: a broker does not tell what it was given."""

    async def send(self, batch: Sequence[Recorded]) -> int:
        """Publish events; an empty batch asks whether the connection still stands.

        The state of a job is published once, for its last event in the batch.

        Returns:
            The length of the batch.

        Raises:
            SinkUnavailable: the broker is away or refuses.
            EventRejected: an event has a topic, a size or content that cannot be published.
        """
        messages, end, why = self._plan(batch)
        await self._publish(messages, end)
        self.suspicious = self.suspicious and not messages
        if why:
            raise EventRejected(why, end)
        return end

    async def tell(self, topic: str, body: bytes) -> None:
        """Publish one retained message.

        Raises:
            SinkUnavailable: the broker is away or refuses.
        """
        try:
            await self._publish([_Message(0, topic, body, retain=True, properties=None)], 1)
        except EventRejected as error:
            raise SinkUnavailable(str(error)) from error

    def _plan(self, batch: Sequence[Recorded]) -> tuple[list[_Message], int, str | None]:
        """The messages of the events before the first impossible one; its place, and why it is."""
        bases: list[str] = []
        why = None
        for event in batch:
            base, why = self._base(event)
            if why:
                break
            bases.append(base)
        newest = {base: place for place, base in enumerate(bases)}
        messages: list[_Message] = []
        for place, base in enumerate(bases):
            kind, body = batch[place].type, batch[place].body
            if not kind.startswith(JOB_TYPE):
                messages.append(_Message(place, f"{base}/status", body, True, self._as_news))
                continue
            topic = f"{base}/events/{kind.removeprefix(JOB_TYPE)}"
            messages.append(_Message(place, topic, body, False, self._as_news))
            if newest[base] == place:
                messages.append(_Message(place, f"{base}/state", body, True, self._as_state))
        return messages, len(bases), why

    def _base(self, event: Recorded) -> tuple[str, str | None]:
        """How the event's topics begin, and why it cannot be published, if it cannot."""
        base = f"{self._prefix}/{event.source}"
        if not event.type.startswith(JOB_TYPE):
            return base, None
        base = f"{base}/{encoded(event.job_id)}"
        if _UNFIT.search(base):
            return base, "its job id has characters that MQTT brokers refuse in topics"
        topic_bytes = len(base.encode()) + len(f"/events/{event.type}")
        if topic_bytes > _MAX_TOPIC_BYTES:
            return base, "its job id is too long for a topic"
        if topic_bytes + len(event.body) > self._max_bytes:
            return base, "it is larger than the broker takes"
        return base, None

    async def _publish(self, messages: Sequence[_Message], end: int) -> None:
        """Publish and wait for every acknowledgement; `end` is the place after the last event."""
        link, sent = self._link, 0
        window = 1 if self.suspicious else self._window
        try:
            link.check()
            for message in messages:
                while len(link.unacknowledged) >= window:
                    await link.news()
                if link.refused:
                    break
                link.put(message)
                sent += 1
            while link.unacknowledged:
                await link.news()
        except aiomqtt.MqttError as error:
            flying = set(link.unacknowledged.values())
            unsent = messages[sent].place if sent < len(messages) else end
            place = min(flying | {unsent})
            self.suspicious = _code(error) in _REJECTIONS
            if self.suspicious and window == 1:
                raise EventRejected(link.explain(error, "it refuses the event"), place) from error
            sentence = link.explain(error, "it ended the connection")
            raise SinkUnavailable(sentence, place) from error
        if link.refused:
            place, reason = min(link.refused.items())
            error = aiomqtt.MqttCodeError(reason)
            failure = EventRejected if reason.value in _REJECTIONS else SinkUnavailable
            raise failure(link.explain(error, "it refuses the event"), place)


class _Message(NamedTuple):
    """A message for the event at this place of a batch."""

    place: int
    topic: str
    body: bytes
    retain: bool
    properties: Properties | None


class _Link(aiomqtt.Client):
    """aiomqtt's connection with what that keeps to itself.

    It ignores the reasons of acknowledgements and the broker's terms, and waits for its timeout
    where the connection has ended.

    Attributes:
        unacknowledged: message id → place of its event, in the order of sending.
        refused: place → reason.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.unacknowledged: dict[int, int] = {}
        self.refused: dict[int, ReasonCode] = {}
        self._where = f"{options['hostname']}:{options['port']}"
        self._is_5 = options["protocol"] is ProtocolVersion.V5
        self._terms: Properties | None = None
        self._changed = asyncio.Event()
        self._over = asyncio.Event()
        self._client.connect_timeout = self.timeout

    async def open(self) -> None:
        """Connect and sign in.

        Raises:
            MqttError: the broker is away or refuses.
        """
        opening = asyncio.create_task(self.__aenter__(), name="connect[mqtt]")
        try:
            await asyncio.shield(opening)
        except BaseException:
            # A thread connects, which cannot be cancelled, and aiomqtt leaves what it opened.
            await self._hang_up()
            await asyncio.wait([opening])
            await self._hang_up()
            raise
        self._disconnected.add_done_callback(self._ended)

    async def close(self) -> None:
        """Disconnect in good order if the broker still listens, at once if it does not."""
        with suppress(aiomqtt.MqttError):
            await self.__aexit__(None, None, None)
        await self._hang_up()

    def term(self, name: str, otherwise: int) -> int:
        """What the broker has set for this connection."""
        value: int = getattr(self._terms, name, otherwise)
        return value

    def properties(self, **more: int) -> Properties | None:
        """Those of an event's message; None before MQTT 5."""
        if not self._is_5:
            return None
        properties = Properties(PacketTypes.PUBLISH)
        properties.ContentType = CONTENT_TYPE
        properties.PayloadFormatIndicator = 1
        for name, value in more.items():
            setattr(properties, name, value)
        return _Packed(properties)

    def check(self) -> None:
        """Raise MqttError if the connection has ended."""
        if self._disconnected.done():
            raise self._disconnected.exception() or aiomqtt.MqttError("it said goodbye")

    def put(self, message: _Message) -> None:
        """Send a message, not waiting for anything.

        Raises:
            MqttError: the connection has ended.
        """
        place, topic, body, retain, properties = message
        info = self._client.publish(topic, body, 1, retain, properties)
        if info.rc:
            self.check()
            raise aiomqtt.MqttCodeError(info.rc)
        self.unacknowledged[info.mid] = place

    async def news(self) -> None:
        """Wait until something has been acknowledged.

        Raises:
            MqttError: the connection has ended, or nothing was acknowledged in time.
        """
        self._changed.clear()
        self.check()
        try:
            async with asyncio.timeout(self.timeout):
                await self._changed.wait()
        except TimeoutError:
            raise aiomqtt.MqttError("it does not acknowledge") from None
        self.check()
        self._hurry()

    def explain(self, error: Exception, otherwise: str) -> str:
        """One sentence: what is wrong, and what to do."""
        code = _code(error)
        text = str(error) if code is None else f"{_ADVICE.get(code, otherwise)} ({error})"
        return f"MQTT broker at {self._where}: {trouble(error) or text}"

    def _hurry(self) -> None:
        """Have the next acknowledgements sent at once.

        A broker without TCP_NODELAY sends the next one only after the kernel here has confirmed
        the one before, and the kernel puts that off for 40 ms once there is nothing to send.
        """
        link = self._client.socket()
        if link is not None and hasattr(socket, "TCP_QUICKACK"):
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)

    async def _hang_up(self) -> None:
        link = self._client.socket()
        if link is not None:
            with suppress(OSError, TimeoutError):
                link.shutdown(socket.SHUT_RDWR)
                async with asyncio.timeout(_GOODBYE_S):
                    await self._over.wait()

    def _ended(self, disconnected: asyncio.Future[None]) -> None:
        self._changed.set()
        if not disconnected.cancelled():
            disconnected.exception()  # asyncio complains of errors that nobody has looked at

    def _on_connect(self, *about: Any) -> None:
        self._terms = about[-1]
        super()._on_connect(*about)

    def _on_publish(
        self, client: Any, userdata: Any, mid: int, reason_code: ReasonCode, properties: Any
    ) -> None:
        place = self.unacknowledged.pop(mid, None)
        if place is not None and reason_code.is_failure:
            self.refused.setdefault(place, reason_code)
        self._changed.set()

    def _on_disconnect(self, *about: Any) -> None:
        self._over.set()
        if not self._connected.done():
            self._connected.set_exception(_ClosedError())
        super()._on_disconnect(*about)


class _ClosedError(aiomqtt.MqttError):
    """The broker closed the connection instead of answering."""

    def __str__(self) -> str:
        return "it closed the connection: is it an MQTT broker, does it want TLS (mqtts://)?"


class _Packed(Properties):
    """Properties of many messages, packed once."""

    def __init__(self, properties: Properties) -> None:
        super().__init__(PacketTypes.PUBLISH)
        vars(self)["bytes"] = properties.pack()

    def pack(self) -> bytes:
        packed: bytes = vars(self)["bytes"]
        return packed


class _TlsSocket(ssl.SSLSocket):
    """Closes itself when its handshake fails; paho leaves it open."""

    def do_handshake(self, block: bool = False) -> None:
        try:
            super().do_handshake(block)
        except BaseException:
            self.close()
            raise


def encoded(job_id: str) -> str:
    """A job id as one level of a topic."""
    return _TO_ENCODE.sub(lambda found: quote(found[0], safe=""), job_id)


def _code(error: Exception) -> int | None:
    reason = getattr(error, "rc", None)
    return reason.value if isinstance(reason, ReasonCode) else None


def _may_be_older(error: Exception) -> bool:
    return isinstance(error, _ClosedError) or _code(error) == 0x84
