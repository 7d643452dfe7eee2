"""The files of TLS: what is taken, and what is wrong with what is not."""

from __future__ import annotations

import ssl
from dataclasses import replace
from pathlib import Path

import pytest
import trustme

from poller.tls import Identity, Unusable, check, context, refusal
from tests import certificates

PASSPHRASE = "p4ss-phr4se"


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def identity(authority: trustme.CA, tmp_path: Path) -> Identity:
    return certificates.client(authority, tmp_path)


def refused(identity: Identity) -> tuple[str, str]:
    """Key and sentence of what is wrong."""
    with pytest.raises(Unusable) as caught:
        check(identity)
    return caught.value.key, str(caught.value)


def test_the_system_s_authorities_are_trusted_unless_told_otherwise() -> None:
    made = context()
    assert (made.verify_mode, made.check_hostname) == (ssl.CERT_REQUIRED, True)
    anybody = context(False)
    assert (anybody.verify_mode, anybody.check_hostname) == (ssl.CERT_NONE, False)


def test_a_bundle_s_authorities_and_no_others_are_trusted(
    authority: trustme.CA, tmp_path: Path
) -> None:
    made = context(certificates.bundle(authority, tmp_path))
    assert (made.verify_mode, made.check_hostname) == (ssl.CERT_REQUIRED, True)
    assert len(made.get_ca_certs()) == 1


@pytest.mark.parametrize("password", [None, PASSPHRASE])
@pytest.mark.parametrize("together", [False, True])
def test_certificate_and_key_are_taken_from_one_file_or_two(
    authority: trustme.CA, tmp_path: Path, together: bool, password: str | None
) -> None:
    identity = certificates.client(authority, tmp_path, together=together, password=password)
    check(identity)
    context(identity=identity)


def test_a_password_that_nothing_asks_for_does_no_harm(identity: Identity) -> None:
    check(replace(identity, password="superfluous"))


@pytest.mark.parametrize("password", [None, "", "wrong", "x" * 2000, "wröng"])
def test_a_key_that_does_not_open_is_told_without_the_password(
    authority: trustme.CA, tmp_path: Path, password: str | None
) -> None:
    identity = certificates.client(authority, tmp_path, password=PASSPHRASE)
    key, sentence = refused(replace(identity, password=password))
    assert key == "client_key_password"
    wrong = "does not open" if password else "missing: encrypted is"
    assert sentence == f"{wrong} the key in {identity.key}"


def test_a_key_of_another_certificate_is_told(
    authority: trustme.CA, identity: Identity, tmp_path: Path
) -> None:
    other = certificates.client(authority, tmp_path / "other", password=PASSPHRASE)
    assert refused(replace(other, cert=identity.cert)) == (
        "client_key",
        f"{other.key}: the key does not belong to the certificate in {identity.cert}",
    )


def test_a_file_that_is_none_or_holds_something_else_is_told(
    identity: Identity, tmp_path: Path
) -> None:
    nonsense = tmp_path / "nonsense.pem"
    nonsense.write_text("nonsense")
    missing = tmp_path / "missing.pem"
    assert identity.key is not None
    for changed, expected in (
        (replace(identity, key=None), ("client_cert", f"{identity.cert}: no private key in it")),
        (replace(identity, key=nonsense), ("client_key", f"{nonsense}: no private key in it")),
        (
            replace(identity, key=missing),
            ("client_key", f"{missing}: No such file or directory"),
        ),
        (replace(identity, cert=nonsense), ("client_cert", f"{nonsense}: no certificate in it")),
        (
            replace(identity, cert=identity.key),
            ("client_cert", f"{identity.key}: no certificate in it"),
        ),
        (replace(identity, cert=tmp_path), ("client_cert", f"{tmp_path}: Is a directory")),
    ):
        assert refused(changed) == expected


def test_an_identity_does_not_show_its_password(identity: Identity) -> None:
    assert PASSPHRASE not in repr(replace(identity, password=PASSPHRASE))


@pytest.mark.parametrize("error", [None, OSError(), ValueError("ALERT_UNKNOWN_CA")])
def test_what_is_no_alert_says_nothing_about_our_certificate(error: Exception | None) -> None:
    assert refusal(error) is None
