"""The fleet's CA on disk: made once, kept, its own certificates renewed."""

from __future__ import annotations

import datetime as dt
import os
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from skerry_contract import ids
from skerry_server import ca

NOW = dt.datetime(2030, 1, 1, tzinfo=dt.UTC)


def load(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def names(path: Path) -> set[str]:
    found = load(path).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return {str(name.value) for name in found}


def test_the_ca_is_made_once_and_its_key_is_private(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        first = ca.open_ca(tmp_path / "ca", NOW)
    finally:
        os.umask(old)
    assert (tmp_path / "ca" / "ca.key").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "ca").stat().st_mode & 0o777 == 0o700
    assert ca.open_ca(tmp_path / "ca", NOW).pem == first.pem
    constraints = load(first.files.ca).extensions.get_extension_for_class(x509.BasicConstraints)
    assert (constraints.critical, constraints.value.ca, constraints.value.path_length) == (True, True, 0)


def test_a_key_left_by_a_torn_first_start_is_replaced(tmp_path: Path) -> None:
    made = ca.open_ca(tmp_path, NOW)
    made.files.ca.unlink()
    again = ca.open_ca(tmp_path, NOW)
    assert again.pem != made.pem
    again.ensure_own([], NOW)
    load(again.files.server_certificate).verify_directly_issued_by(load(again.files.ca))


def test_a_key_of_another_ca_is_refused(tmp_path: Path) -> None:
    ca.open_ca(tmp_path / "a", NOW)
    ca.open_ca(tmp_path / "b", NOW)
    (tmp_path / "a" / "ca.key").write_bytes((tmp_path / "b" / "ca.key").read_bytes())
    with pytest.raises(ValueError, match="is not the P-256 key"):
        ca.open_ca(tmp_path / "a", NOW)


def test_own_certificates_are_kept_until_they_near_their_end_or_lack_a_name(tmp_path: Path) -> None:
    authority = ca.open_ca(tmp_path, NOW)
    authority.ensure_own(["fleet.example", "10.1.2.3"], NOW)
    files = authority.files
    assert names(files.server_certificate) == {"localhost", "127.0.0.1", "::1", "fleet.example", "10.1.2.3"}
    assert names(files.client_certificate) == {"_server"}
    first = load(files.server_certificate).serial_number
    authority.ensure_own(["fleet.example"], NOW + dt.timedelta(days=300))
    assert load(files.server_certificate).serial_number == first
    authority.ensure_own(["fleet.example"], NOW + dt.timedelta(days=350))
    renewed = load(files.server_certificate)
    assert renewed.serial_number != first
    assert renewed.not_valid_after_utc > NOW + dt.timedelta(days=700)
    authority.ensure_own(["other.example"], NOW + dt.timedelta(days=350))
    assert "other.example" in names(files.server_certificate)


def test_what_is_made_while_the_clock_is_wrong_is_good_when_it_is_right_again(tmp_path: Path) -> None:
    for number, off in enumerate((dt.timedelta(days=400), dt.timedelta(days=20_000), dt.timedelta(days=-20_000))):
        authority = ca.open_ca(tmp_path / f"{number}", NOW + off)
        authority.ensure_own([], NOW + off)
        authority.ensure_own([], NOW)
        files = authority.files
        for path in (files.ca, files.server_certificate, files.client_certificate):
            assert load(path).not_valid_before_utc < NOW < load(path).not_valid_after_utc - ca.RENEW_BEFORE, (off, path)
    # A fleet that is there, an hour with a clock a year ahead, and one with a clock at 1970.
    authority = ca.open_ca(tmp_path / "there", NOW)
    for off in (dt.timedelta(), dt.timedelta(days=400), dt.timedelta(days=-20_000)):
        authority.ensure_own([], NOW + off)
        for path in (authority.files.server_certificate, authority.files.client_certificate):
            assert load(path).not_valid_before_utc < NOW < load(path).not_valid_after_utc, off
    authority.issue_listener(tmp_path / "broker", ["broker.example"], NOW + dt.timedelta(days=400))
    assert load(tmp_path / "broker" / "broker.pem").not_valid_before_utc < NOW


def test_a_torn_certificate_is_made_anew(tmp_path: Path) -> None:
    authority = ca.open_ca(tmp_path, NOW)
    authority.ensure_own([], NOW)
    for path in (authority.files.server_certificate, authority.files.server_key):
        path.write_bytes(path.read_bytes()[:100])
        authority.ensure_own([], NOW)
        load(authority.files.server_certificate).verify_directly_issued_by(load(authority.files.ca))
    # The key of one and the certificate of another.
    authority.files.server_key.write_bytes(authority.files.client_key.read_bytes())
    before = load(authority.files.server_certificate).serial_number
    authority.ensure_own([], NOW)
    assert load(authority.files.server_certificate).serial_number != before


@pytest.mark.parametrize("key", [ec.generate_private_key(ec.SECP256R1()), ed25519.Ed25519PrivateKey.generate()])
def test_a_device_certificate_never_outlives_the_ca(
    tmp_path: Path, key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey
) -> None:
    authority = ca.open_ca(tmp_path, NOW)
    late = NOW + ca.CA_LIFE - dt.timedelta(days=10)
    issued = authority.issue_device(ids.device_id("dev"), key.public_key(), late)
    found = x509.load_pem_x509_certificate(issued.certificate_pem.encode())
    assert found.not_valid_after_utc <= load(authority.files.ca).not_valid_after_utc
    assert f"{found.serial_number:x}" == issued.serial
