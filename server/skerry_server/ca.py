"""The fleet's certificate authority: made on first start, it names devices and the server itself.

Owns ``ca/``: ``ca.key`` (0600), ``ca.pem``, the server's certificate for HTTPS and MQTT, and the client certificate ``_server``
with which the server speaks to its broker. From a device's request the CA takes the public key and nothing else: names,
extensions and wishes in it are ignored. The certificate's CN and its only DNS name are the device id; its only URI names the key,
so that a broker can tell the present certificate from one of a key that was replaced.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import ipaddress
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from skerry_contract import ids

from skerry_server import durable
from skerry_server.errors import Invalid

CA_LIFE = dt.timedelta(days=3650)
SERVER_LIFE = dt.timedelta(days=397)
RENEW_BEFORE = dt.timedelta(days=60)
DEVICE_LIFE = dt.timedelta(days=365)
CLOCK_SLACK = dt.timedelta(hours=1)
"""Devices' certificates begin this much earlier: a device's clock may be behind."""
SINCE = dt.datetime(2024, 1, 1, tzinfo=dt.UTC)
"""The CA and the server's own certificates begin here, or with the CA: one that was made while the clock ran ahead is good when it is right
again. Only devices go by when theirs began (they renew at two thirds)."""
MAX_CSR_BYTES = 16 * 1024

DeviceKey = ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey


@dataclass(frozen=True, kw_only=True, slots=True)
class Issued:
    """A device's new certificate.

    Attributes:
        serial: lower-case hex.
        expires_ms: milliseconds since 1970.
        public_key_sha256: hex, of the DER of the SubjectPublicKeyInfo.
    """

    certificate_pem: str
    serial: str
    expires_ms: int
    public_key_pem: str
    public_key_sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Files:
    """Where the certificates and keys are, for those who serve with them."""

    ca: Path
    server_certificate: Path
    server_key: Path
    client_certificate: Path
    client_key: Path


class FleetCA:
    """Signs with the fleet's key. Opened once; safe to use from several threads."""

    def __init__(self, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate, files: Files) -> None:
        self._key = key
        self._certificate = certificate
        self.files = files
        self.pem = certificate.public_bytes(serialization.Encoding.PEM).decode()
        self.sha256 = certificate.fingerprint(hashes.SHA256()).hex()
        """Hex sha256 of the certificate's DER: what an enrolment token carries."""

    def issue_device(self, device: ids.DeviceId, public_key: DeviceKey, now: dt.datetime) -> Issued:
        """A client certificate for the device, with CN = DNS name = its id, and a URI that names its key."""
        spki = public_key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
        pem = public_key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        digest = hashlib.sha256(spki).hexdigest()
        names = [x509.DNSName(str(device)), x509.UniformResourceIdentifier(ids.key_uri(digest))]
        certificate = self._sign(
            str(device), public_key, now, DEVICE_LIFE, names, server=False, begins=now - CLOCK_SLACK
        )
        return Issued(
            certificate_pem=certificate.public_bytes(serialization.Encoding.PEM).decode(),
            serial=f"{certificate.serial_number:x}",
            expires_ms=int(certificate.not_valid_after_utc.timestamp() * 1000),
            public_key_pem=pem.decode(),
            public_key_sha256=digest,
        )

    def ensure_own(self, names: Iterable[str], now: dt.datetime) -> bool:
        """Makes the server's two certificates when they are missing, near their end, or lack one of ``names``.

        Returns whether one was made: whoever serves with it must then read it anew.

        Args:
            names: host names and addresses under which devices reach this server, besides localhost and loopback.
        """
        wanted = list(dict.fromkeys(["localhost", "127.0.0.1", "::1", *names]))
        sans = [_general_name(name) for name in wanted]
        files = self.files
        made = self._ensure(files.server_certificate, files.server_key, "Skerry server", sans, now, server=True)
        own = [x509.DNSName(ids.SERVER_IDENTITY)]
        made |= self._ensure(files.client_certificate, files.client_key, ids.SERVER_IDENTITY, own, now, server=False)
        return made

    def ends(self) -> dict[str, dt.datetime]:
        """When the certificates on disk end, by ``ca``, ``server`` and ``client``; one that cannot be read is left out."""
        found = {"ca": self._certificate.not_valid_after_utc}
        for name, path in (("server", self.files.server_certificate), ("client", self.files.client_certificate)):
            with contextlib.suppress(OSError, ValueError):
                found[name] = x509.load_pem_x509_certificate(path.read_bytes()).not_valid_after_utc
        return found

    def issue_listener(self, folder: Path, names: Iterable[str], now: dt.datetime) -> None:
        """Writes a broker's certificate and key, new ones, and the CA beside them: ``broker.pem``, ``broker.key``, ``ca.pem``.

        Args:
            folder: made when missing.
            names: host names and addresses under which devices and the server reach the broker.
        """
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        key = ec.generate_private_key(ec.SECP256R1())
        sans = [_general_name(name) for name in dict.fromkeys(names)]
        certificate = self._sign("Skerry broker", key.public_key(), now, SERVER_LIFE, sans, server=True)
        durable.write(folder / "broker.key", _key_pem(key), mode=0o600)
        durable.write(folder / "broker.pem", certificate.public_bytes(serialization.Encoding.PEM), mode=0o644)
        durable.write(folder / "ca.pem", self.pem.encode(), mode=0o644)

    def _ensure(
        self, path: Path, key_path: Path, name: str, sans: Sequence[x509.GeneralName], now: dt.datetime, *, server: bool
    ) -> bool:
        if path.exists() and key_path.exists() and self._still_good(path, key_path, sans, now):
            return False
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._sign(name, key.public_key(), now, SERVER_LIFE, sans, server=server)
        durable.write(key_path, _key_pem(key), mode=0o600)
        durable.write(path, certificate.public_bytes(serialization.Encoding.PEM), mode=0o644)
        return True

    def _still_good(self, path: Path, key_path: Path, sans: Sequence[x509.GeneralName], now: dt.datetime) -> bool:
        try:
            certificate = x509.load_pem_x509_certificate(path.read_bytes())
            key = serialization.load_pem_private_key(key_path.read_bytes(), None)
            held = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            certificate.verify_directly_issued_by(self._certificate)
        except (ValueError, TypeError, x509.ExtensionNotFound, InvalidSignature):
            # Torn by a crash between the two writes, or of another CA: made anew.
            return False
        # A crash between the two writes leaves the key of one and the certificate of the other.
        same_key = key.public_key() == certificate.public_key()
        return same_key and set(sans) <= set(held) and certificate.not_valid_after_utc - now > RENEW_BEFORE

    def _sign(
        self,
        name: str,
        public_key: DeviceKey,
        now: dt.datetime,
        life: dt.timedelta,
        sans: Sequence[x509.GeneralName],
        *,
        server: bool,
        begins: dt.datetime | None = None,
    ) -> x509.Certificate:
        usage = ExtendedKeyUsageOID.SERVER_AUTH if server else ExtendedKeyUsageOID.CLIENT_AUTH
        begins = begins or min(now - CLOCK_SLACK, self._certificate.not_valid_before_utc)
        end = min(now + life, self._certificate.not_valid_after_utc)
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(self._certificate.subject)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(begins)
            .not_valid_after(end)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName(sans), critical=False)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(_key_usage(ca=False), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )


def open_ca(directory: Path, now: dt.datetime) -> FleetCA:
    """Opens the fleet's CA, or makes it on the first start.

    Raises:
        ValueError: when the files are there and are not a P-256 key and its certificate.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    files = Files(
        ca=directory / "ca.pem",
        server_certificate=directory / "server.pem",
        server_key=directory / "server.key",
        client_certificate=directory / "client.pem",
        client_key=directory / "client.key",
    )
    key_path = directory / "ca.key"
    if not files.ca.exists():
        # The certificate is written last: without it there is no CA yet, and a key from a torn first start is replaced.
        _make_ca(key_path, files.ca, now)
    key = serialization.load_pem_private_key(key_path.read_bytes(), None)
    certificate = x509.load_pem_x509_certificate(files.ca.read_bytes())
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise ValueError(f"{key_path} is not the P-256 key of {files.ca}")
    return FleetCA(key, certificate, files)


def _make_ca(key_path: Path, certificate_path: Path, now: dt.datetime) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"Skerry fleet CA {secrets.token_hex(4)}")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(now - CLOCK_SLACK, SINCE))
        .not_valid_after(max(now, SINCE) + CA_LIFE)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(ca=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    durable.write(key_path, _key_pem(key), mode=0o600)
    durable.write(certificate_path, certificate.public_bytes(serialization.Encoding.PEM), mode=0o644)


def read_request(pem: str) -> tuple[x509.CertificateSigningRequest, DeviceKey]:
    """Reads a certificate request and checks that its sender holds the key.

    Raises:
        Invalid: not PEM, not signed by its own key, or a key other than P-256 and Ed25519.
    """
    if len(pem) > MAX_CSR_BYTES:
        raise Invalid("bad_csr", f"certificate request: at most {MAX_CSR_BYTES} characters, got {len(pem)}")
    try:
        request = x509.load_pem_x509_csr(pem.encode())
        signed = request.is_signature_valid
        key = request.public_key()
    except (ValueError, UnsupportedAlgorithm) as error:
        raise Invalid("bad_csr", f"certificate request: wanted PEM of a PKCS#10 request: {error}") from None
    if not signed:
        raise Invalid("bad_csr", "certificate request: it is not signed by the key it names")
    if isinstance(key, ed25519.Ed25519PublicKey):
        return request, key
    if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1):
        return request, key
    raise Invalid("bad_csr", f"certificate request: wanted a P-256 or Ed25519 key, got {type(key).__name__}")


def common_name(request: x509.CertificateSigningRequest) -> str | None:
    """The request's only CN, or None. It asks; it does not decide."""
    names = request.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if len(names) == 1 else None


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _key_usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        key_cert_sign=ca,
        crl_sign=ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)
