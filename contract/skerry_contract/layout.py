"""Paths in the update repository: static files that any HTTP server, bucket or CDN can serve.

``metadata/`` TUF metadata, ``targets/`` manifests and group documents with TUF's hash prefix, ``blobs/`` the files of
bundles by digest. Target paths are TUF's; the other functions give paths relative to the repository's root URL.
"""

from __future__ import annotations

import hashlib

from skerry_contract import ids
from skerry_contract.errors import Malformed

CATALOG_ROLE = "catalog"
FLEET_ROLE = "fleet"
CATALOG_PATHS = ("catalog/*/*/*", "catalog/*")
"""TUF's ``*`` does not cross ``/``: the first covers manifests, the second the floors."""
FLEET_PATHS = ("fleet/*",)
FLOORS_TARGET = "catalog/floors.json"
METADATA_DIR = "metadata"
TARGETS_DIR = "targets"
SIGNED_AT_FIELD = "x-skerry-signed-at"
"""Unrecognised field of ``timestamp``: seconds since 1970, UTC. Only a verified timestamp raises a device's lower bound of now."""


def manifest_target(model: ids.ModelName, version: str) -> str:
    """The TUF target path of a bundle's manifest."""
    ids.version_key(version)
    return f"catalog/{ids.model_name(model)}/{version}/manifest.json"


def group_target(group: ids.GroupName) -> str:
    """The TUF target path of a group document."""
    return f"fleet/{ids.group_name(group)}.json"


def target_file(target_path: str, sha256: str) -> str:
    """The file of a target, with TUF's consistent-snapshot hash prefix."""
    folder, _, name = target_path.rpartition("/")
    return f"{TARGETS_DIR}/{folder}/{ids.sha256_hex(sha256)}.{name}"


def blob(sha256: str) -> str:
    """The file of a bundle by its digest."""
    ids.sha256_hex(sha256)
    return f"blobs/sha256/{sha256[:2]}/{sha256}"


def carried_key(digest: str, device: ids.DeviceId) -> str:
    """A bundle's content key, wrapped for one device: in a folder that is carried to it, in no repository. The name tells no device's."""
    named = hashlib.sha256(ids.device_id(device).encode()).hexdigest()
    return f"keys/{ids.bundle_digest(digest)}/{named}.json"


def delta(from_sha256: str, to_sha256: str) -> str:
    """A patch from one blob to another; the digest of the result decides."""
    return f"deltas/{ids.sha256_hex(from_sha256)}/{ids.sha256_hex(to_sha256)}"


def bundle_path(text: object) -> str:
    """Checks a path inside a bundle: relative, plain characters, no ``..``, at most 200 characters.

    Raises:
        Malformed: for anything that could leave the bundle's folder or name it twice.
    """
    if not isinstance(text, str) or not 0 < len(text) <= 200:
        raise Malformed("bundle path", "wanted 1 to 200 characters")
    for part in text.split("/"):
        plain = part and all(c.isascii() and (c.isalnum() or c in "._-") for c in part)
        if not plain or part.startswith("."):
            raise Malformed("bundle path", f"wanted segments of [A-Za-z0-9_-][A-Za-z0-9._-]*, got {text[:100]!r}")
    return text
