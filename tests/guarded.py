"""Users of brokers that let in only whom they know."""

from __future__ import annotations

import base64
import hashlib
import os


def mosquitto_user(name: str, password: str) -> str:
    """A line of mosquitto's password file."""
    salt = os.urandom(12)
    digest = hashlib.pbkdf2_hmac("sha512", password.encode(), salt, 101)
    salt64, digest64 = (base64.b64encode(part).decode() for part in (salt, digest))
    return f"{name}:$7$101${salt64}${digest64}\n"
