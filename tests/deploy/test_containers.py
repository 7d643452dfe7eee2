"""The image and the compose file: linted, hardened, pinned, and without a secret in them."""

from __future__ import annotations

import re
import shlex
from typing import Any

import compose_spec
import pytest

from tests.deploy.programs import DEPLOY, program, said
from tests.deploy.shipped import documents

COMPOSE = "compose/compose.yml"


def compose() -> dict[str, Any]:
    [found] = documents(COMPOSE)
    return found


def services() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = compose()["services"]
    return found


def test_hadolint_has_nothing_to_say_about_the_image() -> None:
    hadolint = program("hadolint", "the dependency group `deploy`")
    assert said(hadolint, "--failure-threshold", "style", DEPLOY / "Dockerfile") == ""


def test_the_image_runs_as_a_user_of_its_own_with_a_check_of_its_health() -> None:
    final = (DEPLOY / "Dockerfile").read_text(encoding="utf-8").rpartition("\nFROM ")[2]
    assert "\nUSER 10001:10001\n" in final
    assert "\nHEALTHCHECK " in final


def test_the_compose_file_follows_the_specification() -> None:
    text = (DEPLOY / COMPOSE).read_text(encoding="utf-8")
    options = compose_spec.PyOptions(apply_merge=True)
    options.from_yaml(text).validate()


@pytest.mark.parametrize("name", services())
def test_a_service_may_do_little(name: str) -> None:
    service = services()[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"cap_add", "privileged", "pid", "ipc", "network_mode", "devices"} & set(service)
    assert service["user"].partition(":")[0] not in {"", "0", "root"}
    limits = service["deploy"]["resources"]["limits"]
    assert set(limits) == {"cpus", "memory", "pids"}


@pytest.mark.parametrize("name", services())
def test_a_service_is_pinned_and_tells_its_health(name: str) -> None:
    service = services()[name]
    assert re.fullmatch(r"[a-z/-]+:v?\d+\.\d+\.\d+[a-z-]*", service["image"])
    assert "healthcheck" in service or "build" in service  # the image has its own


@pytest.mark.parametrize("name", services())
def test_a_service_is_reached_from_this_machine_only(name: str) -> None:
    ports = services()[name].get("ports", [])
    assert all(port.startswith("127.0.0.1:") for port in ports)


@pytest.mark.parametrize("name", services())
def test_a_service_writes_to_volumes_and_reads_files_that_exist(name: str) -> None:
    for volume in services()[name].get("volumes", []):
        source, _, mode = re.fullmatch(r"([^:]+):([^:]+)(?::(ro))?", volume).groups()  # type: ignore[union-attr]  # a volume of another shape fails here, too
        if source.startswith("."):
            assert mode == "ro"
            assert (DEPLOY / "compose" / source).is_file()
        else:
            assert source in compose()["volumes"]


def test_secrets_come_as_files_that_the_script_makes() -> None:
    script = (DEPLOY / "compose/secrets.sh").read_text(encoding="utf-8")
    for name, secret in compose()["secrets"].items():
        assert secret == {"file": f"./secrets/{name}"}
        assert re.search(rf"\b{name}\b", script)
    for name, value in services().items():
        settings = value.get("environment", {})
        secret_words = ("PASSWORD", "TOKEN", "SECRET")
        plain = [key for key in settings if key.endswith(secret_words)]
        assert plain == [], name


def test_the_settings_name_only_secrets_that_the_daemon_is_given() -> None:
    settings = (DEPLOY / "compose/settings.toml").read_text(encoding="utf-8")
    named = set(re.findall(r'"file:/run/secrets/(\w+)"', settings))
    assert named == set(services()["poller"]["secrets"])
    assert "env:" not in settings


def test_the_daemon_is_given_longer_than_it_drains() -> None:
    assert services()["poller"]["stop_grace_period"] == "30s"


def test_the_script_is_a_plain_shell_script() -> None:
    said("sh", "-n", shlex.quote(str(DEPLOY / "compose/secrets.sh")))
