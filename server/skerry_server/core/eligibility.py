"""Which devices a rollout may count on, and what their reports about a bundle mean. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from skerry_contract import manifest as m

UNABLE = frozenset(
    {
        "no_variant", "agent_too_old", "runtime_missing", "not_enough_disk", "not_enough_memory", "storage_failed",
        "not_enrolled", "identity_damaged", "bad_ca", "bad_url", "cancelled", "must_pass_first",
        "encryption_key_differs", "encryption_key_unusable", "no_memory_folder",
        "store_full", "store_busy", "store_failed", "store_damaged",
    }
)  # fmt: skip
"""Codes by which a device says that it cannot run the bundle, or must not by a person's word: nothing about the bundle itself."""
ELSEWHERE = frozenset(
    {
        "unreachable", "timeout", "expired", "rollback", "bad_signature", "malformed_metadata", "withdrawn", "interrupted", "busy", "courier_crashed",
        "process_not_started", "blob_missing", "download_wasted", "activation_overdue", "network_not_allowed",
        "yielded", "mirror_wrong", "key_not_given", "fetch_window_closed",
    }
)  # fmt: skip
"""Codes about the way to the repository and its metadata, which whoever serves it can spoil, about the agent's own helpers on that way, or
about a change of plan: nothing is said about the bundle, and the device tries again."""
OWN_COPY = frozenset({"hash_mismatch", "size_mismatch", "cannot_decrypt"})
"""What differs from its hash, or does not open, is a copy on the device's own disk, or on a stick: wrong bytes of the network are
``mirror_wrong``, and what the repository has was hashed, and opened, when it was taken in. The device tries again a few times."""


def is_verdict_on_bundle(code: str) -> bool:
    """Whether a device's reason code counts against the candidate.

    Every code that is not known to be about the device or the network does: a code that this server does not know yet
    must not let a bad bundle pass.
    """
    return bool(code) and code not in UNABLE | ELSEWHERE | OWN_COPY


def is_unable(code: str) -> bool:
    """Whether nobody need wait for the device, as long as it does not run the bundle after all."""
    return code in UNABLE | OWN_COPY


def has_variant(manifest: m.Manifest, state: Mapping[str, Any]) -> bool:
    """Whether a variant of the bundle fits the runtimes and architecture that the device reported.

    A device that reported no runtime yet is taken as fitting: it decides by itself, and reports ``no_variant`` otherwise.
    """
    runtimes = state.get("runtimes") or {}
    arch = state.get("arch") or ""
    if not runtimes:
        return True
    return any(
        variant.runtime in runtimes and (not variant.arch or not arch or arch in variant.arch)
        for variant in manifest.variants
    )
