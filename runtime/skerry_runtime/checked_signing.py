"""Signing with a key that lies elsewhere, as the server and the operator's tool do it: every signature is checked before it is used.

Owns what both need of keys behind URIs. Which schemes there are, where secrets come from and what a fault is called is each one's own.
"""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable
from typing import TypeVar
from urllib import parse

from securesystemslib.signer import HSMSigner, Key, SecretsHandler, Signature, Signer

T = TypeVar("T")


class ForeignKeyError(Exception):
    """What signed is not the key on record."""


class CheckedSigner(Signer):
    """A signer whose every signature was verified under the public key on record.

    Args:
        uri: where the key lies; fault: what to raise for a fault of the signer behind it.
        first: runs before each signature in the caller's thread, to ask a person for a PIN, say.
    """

    def __init__(
        self,
        inner: Signer,
        public_key: Key,
        uri: str,
        *,
        fault: Callable[[str, Exception], Exception],
        first: Callable[[], object] = lambda: None,
    ) -> None:
        self._inner = inner
        self._public_key = public_key
        self._uri = uri
        self._fault = fault
        self._first = first

    @property
    def public_key(self) -> Key:
        """See ``Signer``."""
        return self._public_key

    def sign(self, payload: bytes) -> Signature:
        """Signs, and checks what came back. Raises what ``fault`` makes of a fault, or of a ``ForeignKeyError``."""
        self._first()
        try:
            made = beside(lambda: self._inner.sign(payload))
            self._verify(made, payload)
        except Exception as error:  # signers of other people's libraries raise what they like
            raise self._fault(self._uri, error) from error
        return made

    def _verify(self, made: Signature, payload: bytes) -> None:
        try:
            self._public_key.verify_signature(made, payload)
        except Exception as error:
            detail = f"what signed is not key {self._public_key.keyid[:16]}, which the record names"
            raise ForeignKeyError(detail) from error

    @classmethod
    def from_priv_key_uri(
        cls, priv_key_uri: str, public_key: Key, secrets_handler: SecretsHandler | None = None
    ) -> Signer:
        """See ``Signer``: the signer that this class is then put around."""
        return Signer.from_priv_key_uri(priv_key_uri, public_key, secrets_handler)


def beside(act: Callable[[], T]) -> T:
    """Runs in a thread of its own, since a PKCS#11 module may share this process's OpenSSL and leave faults in the queue of the
    thread that called it, where the next TLS connection finds them and fails (tried: SoftHSM leaves "no such engine").
    """
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(act).result()


def token_key(uri: str) -> tuple[int, str | None]:
    """Number and token's label of ``hsm:NUMBER?label=TOKEN``.

    Raises:
        ValueError: it is no such URI.

    >>> token_key("hsm:2?label=fleet"), token_key("hsm:7")
    ((2, 'fleet'), (7, None))
    """
    found = parse.urlparse(uri)
    try:
        number = int(found.path) if found.path else HSMSigner.SCHEME_KEYID
        query = dict(parse.parse_qsl(found.query, strict_parsing=True)) if found.query else {}
    except ValueError:
        number, query = -1, {}
    if number < 0 or query.keys() - {"label"}:
        raise ValueError(f"{uri}: wanted hsm:NUMBER?label=TOKEN")
    return number, query.get("label")
