"""An encryption key behind a PKCS#11 URI (RFC 7512): a TPM's, a secure element's or a card's token. It never leaves it.

``pkcs11:token=LABEL;object=LABEL?module-path=/path/of/library.so&pin-source=/path/of/file``. The key is one on P-256 whose use is ``derive``;
``skerry-agent`` makes none: who provisions the device does, with the token's own tools.
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import parse_qs, unquote

import pkcs11
from pkcs11.mechanisms import KDF, Mechanism

from skerry_agent.errors import Degraded

_POINT_BYTES = 65


class OnToken:
    """As ``encryption_key.Holder``. Raises ``Degraded`` (``encryption_key_unusable``), never with the PIN in its words."""

    def __init__(self, uri: str) -> None:
        path, _, query = uri.removeprefix("pkcs11:").partition("?")
        named = {name: unquote(value) for name, _, value in (part.partition("=") for part in path.split(";")) if name}
        asked = {name: values[0] for name, values in parse_qs(query).items()}
        lacking = [name for name in ("token", "object") if not named.get(name)]
        lacking += [name for name in ("module-path",) if not asked.get(name)]
        if lacking:
            raise _unusable(f"encryption.key: wanted {', '.join(lacking)} in the URI")
        self._label = named["object"]
        try:
            pin = Path(asked["pin-source"].removeprefix("file:")).read_text().strip() if "pin-source" in asked else None
            token = pkcs11.lib(asked["module-path"]).get_token(token_label=named["token"])
            try:
                self._session = token.open(user_pin=pin)
            except pkcs11.UserAlreadyLoggedIn:
                # Of this process, in another session: a log-in holds for all of them.
                self._session = token.open()
            key = self._session.get_key(
                object_class=pkcs11.ObjectClass.PRIVATE_KEY, key_type=pkcs11.KeyType.EC, label=self._label
            )
            if not isinstance(key, pkcs11.DeriveMixin):
                raise _unusable(f"{self._label}: wanted a private key that may derive")
            self._key = key
            public = self._session.get_key(
                object_class=pkcs11.ObjectClass.PUBLIC_KEY, key_type=pkcs11.KeyType.EC, label=self._label
            )
            self._point = _unwrapped(bytes(public[pkcs11.Attribute.EC_POINT]))
        except OSError as error:
            raise _unusable(f"pin-source: {error.strerror or error}") from None
        except (pkcs11.PKCS11Error, RuntimeError) as error:
            raise _unusable(f"{named['token']}/{self._label}: {type(error).__name__} {error}") from None

    def point(self) -> bytes:
        """See ``Holder``."""
        return self._point

    def secret(self, sender: bytes) -> bytes:
        """See ``Holder``; the secret is derived on the token, and only it comes out."""
        from cryptography.hazmat.primitives.asymmetric import ec

        # Not every token looks whether a point is on the curve; one that is not would ask about the key.
        ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), sender)
        try:
            derived = self._key.derive_key(
                pkcs11.KeyType.GENERIC_SECRET,
                256,
                mechanism=Mechanism.ECDH1_DERIVE,
                mechanism_param=(KDF.NULL, None, sender),
                template={pkcs11.Attribute.SENSITIVE: False, pkcs11.Attribute.EXTRACTABLE: True},
            )
            return bytes(derived[pkcs11.Attribute.VALUE])
        except pkcs11.PKCS11Error as error:
            raise _unusable(f"{self._label}: derive: {type(error).__name__} {error}") from None


def _unwrapped(point: bytes) -> bytes:
    """An EC_POINT is the point in a DER octet string; some tokens leave that away."""
    if len(point) == _POINT_BYTES + 2 and point[:2] == bytes([4, _POINT_BYTES]):
        point = point[2:]
    if len(point) != _POINT_BYTES or point[0] != 4:
        raise _unusable(f"wanted a key on P-256, its point has {len(point)} bytes")
    return point


def _unusable(detail: str) -> Degraded:
    return Degraded(
        "encryption_key_unusable", detail, advice="look at encryption.key, the token, its PIN file and its driver"
    )
