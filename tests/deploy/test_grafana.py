"""The dashboard: readable by Grafana, made of queries that can be answered."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import yaml

from tests.deploy.programs import metrics_in, promtool, texts
from tests.deploy.published import FAMILIES, SERIES
from tests.deploy.shipped import dashboard, queries


def panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = dashboard()["panels"]
    return found


def test_a_panel_has_an_id_and_a_place_of_its_own() -> None:
    ids = [panel["id"] for panel in panels()]
    assert len(set(ids)) == len(ids)
    places = [panel["gridPos"] for panel in panels()]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    for one, other in itertools.combinations(places, 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        below = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or below, (one, other)


def test_a_panel_says_what_it_shows() -> None:
    shown = [panel for panel in panels() if panel["type"] != "row"]
    assert all(panel["title"] and panel["description"] for panel in shown)


def test_the_panels_stand_in_rows_that_begin_with_the_overview() -> None:
    rows = [panel["title"] for panel in panels() if panel["type"] == "row"]
    assert rows == ["Overview", "Sources", "Relays", "Detection", "Process"]
    assert panels()[0]["type"] == "row"


def test_the_data_source_is_chosen_by_whoever_looks() -> None:
    names = {variable["name"] for variable in dashboard()["templating"]["list"]}
    assert names == {"datasource", "instance", "source"}
    assert set(texts(panels(), "uid")) == {"${datasource}"}


def test_the_queries_ask_for_metrics_that_exist_and_for_all_of_them() -> None:
    asked = set().union(*(metrics_in(query) for query in queries()))
    assert asked <= SERIES
    bases = {name.removesuffix("_bucket") for name in asked}
    assert bases == set(FAMILIES)
    variables = json.dumps(dashboard()["templating"])
    assert metrics_in(variables.replace('\\"', "'").replace('"', " ")) <= SERIES


def test_promtool_can_parse_every_query(tmp_path: Path) -> None:
    rules = [
        {"record": f"panel:query:{number}", "expr": query} for number, query in enumerate(queries())
    ]
    path = tmp_path / "queries.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "g", "rules": rules}]}), encoding="utf-8")
    assert f"{len(rules)} rules found" in promtool("check", "rules", path)
