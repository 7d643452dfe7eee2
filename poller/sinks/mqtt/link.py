"""aiomqtt's connection with what it keeps to itself.

aiomqtt drops the reason of an acknowledgement and the broker's terms, and where the connection has
ended, its `publish` waits for the timeout. So messages go to its paho client directly, which costs
half as much besides.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from contextlib import suppress
from typing import Any, Final, NamedTuple

import aiomqtt
from aiomqtt import ProtocolVersion
from paho.mqtt import client as paho
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from poller.sinks import trouble

_HANG_UP_S: Final = 1.0
_NO_SUCH_VERSION: Final = 0x84
_ADVICE: Final = {
    _NO_SUCH_VERSION: "it does not speak this version of MQTT: see mqtt.protocol",
    0x86: "it refuses mqtt.username or mqtt.password",
    0x87: "check mqtt.username and mqtt.password, and what deploy/mosquitto.acl lists",
    0x8E: "another client took over: does another poller have the same poller.instance?",
}


class Message(NamedTuple):
    """A message for the event at this place of a batch, QoS 1."""

    place: int
    topic: str
    body: bytes
    retain: bool = False
    properties: Properties | None = None


class Link(aiomqtt.Client):
    """A connection to a broker; every method may raise `MqttError`.

    Args:
        protocol: version of MQTT to speak.
        options: further arguments of aiomqtt's client.

    Attributes:
        unacknowledged: message id → place of its event, in the order of sending.
        refused: place → reason of its refusal.
    """

    def __init__(self, protocol: ProtocolVersion, options: dict[str, Any]) -> None:
        super().__init__(protocol=protocol, **options)
        self.unacknowledged: dict[int, int] = {}
        self.refused: dict[int, ReasonCode] = {}
        self._where = f"{options['hostname']}:{options['port']}"
        self._is_secure = "tls_context" in options
        self._is_5 = protocol is ProtocolVersion.V5
        self._terms: Properties | None = None
        self._abandoned = False
        self._changed = asyncio.Event()
        self._over = asyncio.Event()
        self._client.connect_timeout = self.timeout
        self._client.disable_logger()  # whatever it would log comes as an error as well

    async def open(self) -> None:
        """Connect and sign in."""
        opening = asyncio.create_task(self.__aenter__(), name="connect[mqtt]")
        try:
            await asyncio.shield(opening)
        except BaseException as error:
            unanswered = self._client.socket() is not None
            # A thread connects, which cannot be cancelled, and aiomqtt leaves what it opened.
            self._abandoned = True
            await self._hang_up()
            await asyncio.wait([opening])
            opening.cancelled() or opening.exception()  # asyncio logs what nobody has looked at
            if unanswered and isinstance(error, aiomqtt.MqttError):
                raise NoAnswerError("it does not answer") from error
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

    def properties(self, **values: str | int) -> Properties | None:
        """Properties for many messages; None before MQTT 5, which has none."""
        return _Packed(values) if self._is_5 else None

    def check(self) -> None:
        """Raise if the connection has ended."""
        if self._disconnected.done():
            raise self._disconnected.exception() or aiomqtt.MqttError("it said goodbye")

    def put(self, message: Message) -> None:
        """Send a message, not waiting for anything."""
        place, topic, body, retain, properties = message
        info = self._client.publish(topic, body, 1, retain, properties)
        if info.rc:
            raise aiomqtt.MqttCodeError(info.rc)
        self.unacknowledged[info.mid] = place

    def ping(self, topic: str) -> None:
        """Ask for a sign of life: a subscription that there never was is taken back.

        MQTT's own ping is paho's, which does not tell of the answer.
        """
        result, mid = self._client.unsubscribe(topic)
        if mid is None:
            raise aiomqtt.MqttCodeError(result)
        self.unacknowledged[mid] = 0

    async def news(self) -> None:
        """Wait until something has been acknowledged or answered."""
        self._changed.clear()
        self.check()
        try:
            async with asyncio.timeout(self.timeout):
                await self._changed.wait()
        except TimeoutError:
            raise aiomqtt.MqttError("it acknowledges nothing: is it overloaded?") from None
        self.check()
        self._hurry()

    def explain(self, error: Exception, otherwise: str) -> str:
        """One sentence: what is wrong, and what to do; `otherwise` if the reason has no advice."""
        code = code_of(error)
        if isinstance(error, NoAnswerError):
            doubt = "is TLS (mqtts://) wanted or not?"
            if self._is_secure:
                doubt = "does it want a client certificate, or another one (mqtt.client_cert)?"
            text = f"{error}: is it an MQTT broker, and {doubt}"
        elif code is None:
            text = trouble(error) or str(error)
        else:
            text = f"{_ADVICE.get(code, otherwise)} ({error})"
        return f"MQTT broker at {self._where}: {text}"

    def _hurry(self) -> None:
        """Let the broker send further acknowledgements at once.

        A broker without TCP_NODELAY holds them back until the kernel here has confirmed the first,
        and the kernel takes 40 ms for that where nothing else is to be sent.
        """
        link = self._client.socket()
        if isinstance(link, socket.socket) and hasattr(socket, "TCP_QUICKACK"):
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)

    async def _hang_up(self) -> None:
        link = self._client.socket()
        if isinstance(link, socket.socket):
            with suppress(OSError, TimeoutError):
                link.shutdown(socket.SHUT_RDWR)
                async with asyncio.timeout(_HANG_UP_S):
                    await self._over.wait()

    def _ended(self, disconnected: asyncio.Future[None]) -> None:
        self._changed.set()
        self._look_at(disconnected)

    def _look_at(self, future: asyncio.Future[None]) -> None:
        """Asyncio logs errors that nobody has looked at."""
        if future.done() and not future.cancelled():
            future.exception()

    def _on_socket_open(self, client: paho.Client, userdata: object, sock: Any) -> None:
        super()._on_socket_open(client, userdata, sock)
        if self._abandoned:
            sock.shutdown(socket.SHUT_RDWR)

    def _on_connect(
        self,
        client: paho.Client,
        userdata: object,
        flags: paho.ConnectFlags,
        reason_code: ReasonCode,
        properties: Properties | None = None,
    ) -> None:
        self._terms = properties
        super()._on_connect(client, userdata, flags, reason_code, properties)

    def _on_publish(
        self,
        _client: paho.Client,
        _userdata: object,
        mid: int,
        reason_code: ReasonCode,
        _properties: Properties,
    ) -> None:
        place = self.unacknowledged.pop(mid, None)
        if place is not None and reason_code.is_failure:
            self.refused.setdefault(place, reason_code)
        self._changed.set()

    def _on_unsubscribe(
        self,
        _client: paho.Client,
        _userdata: object,
        mid: int,
        _reason_codes: list[ReasonCode],
        _properties: Properties | None = None,
    ) -> None:
        self.unacknowledged.pop(mid, None)
        self._changed.set()

    def _on_disconnect(
        self,
        client: paho.Client,
        userdata: object,
        flags: paho.DisconnectFlags,
        reason_code: ReasonCode,
        properties: Properties | None = None,
    ) -> None:
        self._over.set()
        if not self._connected.done():
            self._connected.set_exception(NoAnswerError("it closed the connection"))
        super()._on_disconnect(client, userdata, flags, reason_code, properties)
        for future in (self._connected, self._disconnected):
            self._look_at(future)

    def _on_message(
        self, _client: paho.Client, _userdata: object, _message: paho.MQTTMessage
    ) -> None:
        """Nothing was subscribed to: what comes is not kept."""


class TlsSocket(ssl.SSLSocket):
    """Closes itself when its handshake fails; paho would leave it open."""

    def do_handshake(self, block: bool = False) -> None:
        """Do it or close."""
        try:
            super().do_handshake(block)
        except BaseException:
            self.close()
            raise


class NoAnswerError(aiomqtt.MqttError):
    """The broker, if it is one, did not answer the request to connect."""


def code_of(error: Exception) -> int | None:
    """MQTT 5's code for the reason of an error, if it has one."""
    reason = getattr(error, "rc", None)
    return reason.value if isinstance(reason, ReasonCode) else None


def wants_another_version(error: Exception) -> bool:
    """Whether a broker that does not know this version of MQTT may be behind an error of `open`."""
    return isinstance(error, NoAnswerError) or code_of(error) == _NO_SUCH_VERSION


class _Packed(Properties):
    """Properties of many messages; paho would pack them again for each."""

    def __init__(self, values: dict[str, str | int]) -> None:
        super().__init__(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]  # paho's have none
        for name, value in values.items():
            setattr(self, name, value)
        vars(self)["packed"] = super().pack()  # type: ignore[no-untyped-call]  # likewise

    def pack(self) -> bytes:
        packed: bytes = vars(self)["packed"]
        return packed
