"""Chance in the hands of a fuzzer."""

from __future__ import annotations

from random import Random


class Dice(Random):
    """Rolls the bytes that it is given, and zeros after them."""

    def __init__(self, data: bytes) -> None:
        super().__init__()
        self._left = data

    def random(self) -> float:
        return self.getrandbits(53) / 2**53

    def getrandbits(self, k: int, /) -> int:
        count = (k + 7) // 8
        taken, self._left = self._left[:count], self._left[count:]
        return int.from_bytes(taken.ljust(count, b"\0"), "big") >> (count * 8 - k)

    def rest(self) -> bytes:
        """What has not been rolled yet."""
        return self._left
