"""The files of deploy/, read."""

from __future__ import annotations

import json
from typing import Any

import yaml

from tests.deploy.programs import DEPLOY, texts


def dashboard() -> dict[str, Any]:
    """The Grafana dashboard."""
    found: dict[str, Any] = json.loads((DEPLOY / "grafana/poller.json").read_text(encoding="utf-8"))
    return found


def queries() -> list[str]:
    """Its PromQL, with all instances and sources chosen, and a minute for rates."""
    values = {"$instance": ".*", "$source": ".*", "$__rate_interval": "1m"}
    found = list(texts(dashboard()["panels"], "expr"))
    for variable, value in values.items():
        found = [query.replace(variable, value) for query in found]
    return found


def documents(path: str) -> list[dict[str, Any]]:
    """The YAML documents of a file of deploy/."""
    return list(yaml.safe_load_all((DEPLOY / path).read_text(encoding="utf-8")))
