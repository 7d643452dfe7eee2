"""Reads file and environment into tables, and gathers everything that is wrong with them."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import pydantic

from poller.errors import SettingsError
from poller.settings.exposure import exposed
from poller.settings.peer import CLIENT_KEYS
from poller.settings.tables import SOURCE_KEYS, SOURCE_NAME, TABLES, Settings, Source, keys
from poller.settings.values import has_tls
from poller.tls import Unusable

M = TypeVar("M", bound=pydantic.BaseModel)
Vendors: TypeAlias = Mapping[str, type[pydantic.BaseModel]]
Value: TypeAlias = Any
"""What TOML and JSON can hold."""

Table: TypeAlias = dict[str, Value]
Place: TypeAlias = tuple[str | int, ...]
"""Where a value stands: keys of tables and indices of lists, from the top."""

Fault: TypeAlias = Mapping[str, Any]
"""One error as pydantic details it."""

_MOST_BYTES = 1 << 20
_KUBERNETES = re.compile(
    r"POLLER_(\w+_)?(SERVICE_(HOST|PORT(_\w+)?)|PORT(_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)"
)

_WORDS = {
    "json_invalid": "holds text that is not UTF-8",
    "missing": "missing",
    "dict_type": "must be a table",
    "model_type": "must be a table",
    "union_tag_invalid": "must be one of {expected_tags}",
    "union_tag_not_found": "missing",
}
"""What is said for pydantic's types of errors, where its own words would not help."""


def load(path: Path, vendors: Vendors, environ: Mapping[str, str]) -> Settings:
    """Read settings from a TOML file and the environment; nothing else is read but secret files.

    A variable `POLLER_A__B__C` sets the key `a.b.c` and wins over the file; in a source's name
    `-` is written `_`, and a name that the file lacks is a new source. Its value is the text
    itself where the key takes text; numbers, booleans, lists and tables are written as in TOML or
    JSON, and a table set whole is refined by variables for its keys. A `POLLER_` variable that
    matches no key is an error like an unknown key in the file, so that a misspelt override is
    noticed. Left alone are variables that some value refers to as `env:POLLER_…`, and those that
    Kubernetes sets for a service called poller (`POLLER_SERVICE_HOST`, `POLLER_PORT_8787_TCP`, …).

    Args:
        path: the file.
        vendors: name → model of the vendor's own keys in a source.
        environ: the environment, for overrides and for secrets.

    Raises:
        SettingsError: with every problem of file, environment and secrets, one line each, sorted.
            No line holds a secret.
    """
    try:
        return _load(path, vendors, environ)
    except RecursionError as error:
        problem = "too many tables or lists in each other, here or in a POLLER_ variable"
        raise SettingsError([f"{path}: {problem}"]) from error


def _load(path: Path, vendors: Vendors, environ: Mapping[str, str]) -> Settings:
    document = _parse(path)
    origins = _override(document, environ)
    reader = _Reader(environ, origins)
    known = [*TABLES, "sources"]
    for name in document.keys() - set(known):
        advice = "; between levels write __" if (name,) in origins else ""
        reader.blame((name,), _unknown(name, known) + advice)
    tables = {
        name: reader.read(model, document[name], (name,), keys(model))
        for name, model in TABLES.items()
        if name in document
    }
    defaults = document["defaults"] if tables.pop("defaults", None) else {}
    sources = _sources(reader, document.get("sources"), defaults, vendors)
    if reader.problems:
        raise SettingsError(sorted(reader.problems))
    return Settings.model_validate(
        {**tables, "sources": sources, "exposed": tuple(exposed(document))}
    )


def _parse(path: Path) -> Table:
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except OSError as error:
        advice = "name another with -c, or start from the settings.toml that comes with poller"
        raise SettingsError([f"{path}: {error.strerror}; {advice}"]) from error
    if len(content) > _MOST_BYTES:
        raise SettingsError([f"{path}: larger than 1 MiB; is it the settings file?"])
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise SettingsError([f"{path}: not UTF-8 text (at line {line})"]) from error
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        lines = text.split("\n")
        end = f"at line {len(lines)}, column {len(lines[-1]) + 1}, the end of the file"
        problem = str(error).replace("at end of document", end)
        raise SettingsError([f"{path}: not TOML: {problem}"]) from error


def _override(document: Table, environ: Mapping[str, str]) -> dict[Place, str]:
    """Write the environment's values over the file's; gives back which variable set which place."""
    ours = {name: value for name, value in environ.items() if name.startswith("POLLER_")}
    referred = re.findall(r"\benv:(\w+)", json.dumps([document, *ours.values()], default=str))
    origins: dict[Place, str] = {}
    # Shorter names first: a table set whole is refined by variables for its keys.
    for name in sorted(ours.keys() - set(referred), key=lambda name: (name.count("__"), name)):
        if "__" not in name and _KUBERNETES.fullmatch(name):
            continue
        place = _place(name, document.get("sources"))
        table = document
        for depth, part in enumerate(place[:-1], 1):
            if not isinstance(table.get(part), dict):
                table[part] = {}
                origins[place[:depth]] = name
            table = table[part]
        value = _decode(ours[name])
        # A number or boolean may be meant as text: the model decides, see `_Reader.read`.
        table[place[-1]] = value if isinstance(value, dict | list) else ours[name]
        origins[place] = name
    return origins


def _place(variable: str, sources: object) -> tuple[str, ...]:
    """The keys that a variable's name stands for, given the sources that are known so far."""
    path = variable.removeprefix("POLLER_").lower()
    names = sources if isinstance(sources, dict) else {}
    for name in sorted(names, key=len, reverse=True):
        start = f"sources__{name.replace('-', '_')}"
        if path == start:
            return ("sources", name)
        if path.startswith(f"{start}__"):
            return ("sources", name, *path.removeprefix(f"{start}__").split("__"))
    return tuple(path.split("__"))


def _decode(text: str) -> Value:
    """The JSON or TOML value that a text spells; the text itself if it spells none."""
    try:
        value = json.loads(text)
    except ValueError:
        try:
            document = tomllib.loads(f"value = {text}")
        except ValueError:
            return text
        value = document["value"] if len(document) == 1 else text
    return value


class _Reader:
    """Reads tables into models, and gathers what is wrong with them in `problems`.

    Args:
        environ: for secrets.
        origins: which variable set which place.
    """

    def __init__(self, environ: Mapping[str, str], origins: Mapping[Place, str]) -> None:
        self.problems: list[str] = []
        self._environ = environ
        self._origins = origins

    def read(self, model: type[M], table: Value, at: Place, known: Collection[str]) -> M | None:
        """The table as a model; None if anything is wrong with it.

        Args:
            model: what to read it as.
            table: its keys and values; numbers and booleans from the environment are put into it.
            at: where it stands.
            known: what it may hold, for advice on unknown keys.
        """
        try:
            # Strictly, as JSON: text is no number, but a list may become a tuple, a word an enum.
            return model.model_validate_json(
                json.dumps(table, default=str),
                strict=True,
                context=self._environ,
                by_alias=True,
                by_name=False,
            )
        except pydantic.ValidationError as error:
            details = error.errors(include_url=False, include_input=False)
        faults: list[Fault] = [{**fault} for fault in details]
        places = [_within(table, fault) for fault in faults]
        spelt = [self._spell(table, at, place) for place in places]
        if any(spelt):
            return self.read(model, table, at, known)
        for place, fault in zip(places, faults, strict=True):
            self.blame(at + place, _sentence(fault, known if len(place) == 1 else ()))
        return None

    def blame(self, place: Place, sentence: str) -> None:
        """Write down what is wrong with a place, and which variable set it."""
        heads = (place[:depth] for depth in range(len(place), 0, -1))
        variable = next((self._origins[head] for head in heads if head in self._origins), None)
        line = f"{_dotted(place)}: {' '.join(sentence.split())}"
        self.problems.append(f"{line} (see {variable})" if variable else line)

    def _spell(self, table: Value, at: Place, place: Place) -> bool:
        """Take a refused text from the environment for the number or boolean that it spells."""
        if not place or at + place not in self._origins:
            return False
        for part in place[:-1]:
            table = table[part]
        text = table.get(place[-1])
        value = _decode(text) if isinstance(text, str) else None
        if not isinstance(value, int | float):
            return False
        table[place[-1]] = value
        return True


def _sources(
    reader: _Reader, tables: object, defaults: Table, vendors: Vendors
) -> dict[str, Source]:
    """Every source that is right; what is wrong with the others is the reader's to keep."""
    if not isinstance(tables, dict) or not tables:
        reader.blame(("sources",), "name at least one, as a table [sources.<name>]")
        return {}
    sources = {}
    flat: dict[str, str] = {}
    for name, table in tables.items():
        at = ("sources", name)
        if not re.fullmatch(SOURCE_NAME, name):
            reader.blame(at, "a name is lower-case letters, digits, _ and -, no _ or - in front")
        other = flat.setdefault(name.replace("-", "_"), name)
        if other != name:
            reader.blame(
                at, f"is the same as {other} in variables, where - is written _; rename one"
            )
        if not isinstance(table, dict):
            reader.blame(at, "must be a table")
            continue
        source = _source(reader, name, {**_inherited(defaults, table), **table}, vendors)
        if source is not None:
            sources[name] = source
    return sources


def _inherited(defaults: Table, table: Table) -> Table:
    """What a source takes over: a client certificate as a whole, and only where it is of use."""
    own = any(key in table for key in CLIENT_KEYS)
    if own or not has_tls(str(table.get("url"))):
        return {key: value for key, value in defaults.items() if key not in CLIENT_KEYS}
    return defaults


def _source(reader: _Reader, name: str, table: Table, vendors: Vendors) -> Source | None:
    at = ("sources", name)
    common = {key: value for key, value in table.items() if key in SOURCE_KEYS}
    own = {key: value for key, value in table.items() if key not in SOURCE_KEYS}
    vendor = str(table.get("vendor"))
    source = reader.read(Source, {**common, "name": name, "vendor": vendor}, at, SOURCE_KEYS)
    if vendor not in vendors:
        reader.blame((*at, "vendor"), f"must be one of {', '.join(sorted(vendors))}")
        return None
    model = vendors[vendor]
    options = reader.read(model, own, at, [*SOURCE_KEYS, *keys(model)])
    if source is None or options is None:
        return None
    return source.model_copy(update={"options": options})


def _within(table: Value, fault: Fault) -> Place:
    """Where in the table a fault is: its location without pydantic's names for unions' branches."""
    place: Place = ()
    for part in fault["loc"]:
        inside = isinstance(table, dict) and part in table
        if inside or (isinstance(table, list) and isinstance(part, int)):
            table, place = table[part], (*place, part)
    if fault["type"] == "missing":
        return (*place, fault["loc"][-1])
    error = fault.get("ctx", {}).get("error")
    if isinstance(error, Unusable):
        return (*place, error.key)
    discriminator = fault.get("ctx", {}).get("discriminator")
    return (*place, str(discriminator).strip("'")) if discriminator else place


def _sentence(fault: Fault, known: Collection[str]) -> str:
    """What is wrong, never with the value: it may be a secret in the wrong place."""
    kind, context = fault["type"], fault.get("ctx", {})
    if kind == "extra_forbidden":
        return _unknown(str(fault["loc"][-1]), known)
    if kind == "value_error":
        return str(context["error"])
    if kind in _WORDS:
        return _WORDS[kind].format(**context)
    return str(fault["msg"]).replace("Input should be", "must be")


def _unknown(key: str, known: Collection[str]) -> str:
    near = get_close_matches(key, known, n=1)
    if near:
        return f"unknown key; did you mean {near[0]}?"
    return f"unknown key; known are {', '.join(known)}" if known else "unknown key"


def _dotted(place: Place) -> str:
    """A place as TOML writes it, with indices in brackets."""
    text = ""
    for part in place:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            bare = re.fullmatch(r"[A-Za-z0-9_-]+", part)
            text += f".{part if bare else json.dumps(part)}"
    return text.removeprefix(".")
