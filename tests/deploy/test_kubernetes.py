"""The Kubernetes manifests: valid in old and new releases, complete, and restricted."""

from __future__ import annotations

import re
from typing import Any

import kubernetes_validate
import pytest

from tests.deploy.programs import DEPLOY
from tests.deploy.shipped import documents

FOLDER = DEPLOY / "kubernetes"
OLDEST, NEWEST = "1.29", "1.37"


def kustomization() -> dict[str, Any]:
    [found] = documents("kubernetes/kustomization.yaml")
    return found


def resources() -> dict[str, dict[str, Any]]:
    """What is applied, by kind."""
    found = [
        document
        for name in kustomization()["resources"]
        for document in documents(f"kubernetes/{name}")
    ]
    return {document["kind"]: document for document in found}


def pod() -> dict[str, Any]:
    found: dict[str, Any] = resources()["StatefulSet"]["spec"]["template"]["spec"]
    return found


def container() -> dict[str, Any]:
    [found] = pod()["containers"]
    return dict(found)


@pytest.mark.parametrize("release", [OLDEST, NEWEST])
@pytest.mark.parametrize("kind", resources())
def test_a_manifest_is_valid(kind: str, release: str) -> None:
    kubernetes_validate.validate(resources()[kind], release, strict=True)


def test_the_kustomization_names_every_file_and_no_other() -> None:
    named = {*kustomization()["resources"], "kustomization.yaml"}
    named |= {name for made in kustomization()["configMapGenerator"] for name in made["files"]}
    assert named == {path.name for path in FOLDER.iterdir()}


def test_one_daemon_has_the_journal() -> None:
    spec = resources()["StatefulSet"]["spec"]
    [claim] = spec["volumeClaimTemplates"]
    assert spec["replicas"] == 1
    assert claim["spec"]["accessModes"] == ["ReadWriteOncePod"]
    assert set(spec["persistentVolumeClaimRetentionPolicy"].values()) == {"Retain"}
    mounts = {mount["name"]: mount for mount in container()["volumeMounts"]}
    assert mounts.pop(claim["metadata"]["name"])["mountPath"] == "/var/lib/poller"
    assert all(mount["readOnly"] for mount in mounts.values())
    assert set(mounts) == {volume["name"] for volume in pod()["volumes"]}


def test_the_pod_keeps_to_the_restricted_profile() -> None:
    whole, own = pod()["securityContext"], container()["securityContext"]
    assert whole["runAsNonRoot"] is True
    assert whole["runAsUser"] == whole["runAsGroup"] == whole["fsGroup"] == 10001
    assert whole["seccompProfile"] == {"type": "RuntimeDefault"}
    assert own == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod()["automountServiceAccountToken"] is False
    labels = resources()["Namespace"]["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    assert container()["resources"]["limits"]["memory"]


def test_services_put_nothing_that_looks_like_a_setting_into_the_environment() -> None:
    assert pod()["enableServiceLinks"] is False


def test_everything_names_the_same_pod() -> None:
    spec = resources()["StatefulSet"]["spec"]
    labels = {"app.kubernetes.io/name": "poller"}
    assert spec["template"]["metadata"]["labels"] == spec["selector"]["matchLabels"] == labels
    assert resources()["Service"]["spec"]["selector"] == labels
    assert resources()["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == labels
    assert spec["serviceName"] == resources()["Service"]["metadata"]["name"]
    assert pod()["serviceAccountName"] == resources()["ServiceAccount"]["metadata"]["name"]
    [generated] = kustomization()["configMapGenerator"]
    [image] = kustomization()["images"]
    assert pod()["volumes"][0]["configMap"]["name"] == generated["name"]
    assert container()["image"] == image["name"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", image["newTag"])


def test_the_settings_name_only_secrets_that_the_instructions_make() -> None:
    settings = (FOLDER / "settings.toml").read_text(encoding="utf-8")
    instructions = (FOLDER / "kustomization.yaml").read_text(encoding="utf-8")
    named = set(re.findall(r'"file:/run/secrets/poller/(\w+)"', settings))
    assert named == set(re.findall(r"--from-file=(\w+)", instructions))
    assert settings.count("file:") == len(named)
    [secrets] = [mount for mount in container()["volumeMounts"] if mount["name"] == "secrets"]
    assert secrets["mountPath"] == "/run/secrets/poller"
