"""Runs a bundle on this machine before it is pushed: the same child process and the same checks as the server's."""

from __future__ import annotations

import json
from typing import Any

from skerry_cli.bundle import Bundle
from skerry_cli.errors import Usage


def validate(bundle: Bundle, *, timeout_s: float = 120.0) -> dict[str, Any]:
    """The report as builtins: ``ok``, ``code``, ``detail``, ``advice``, ``variants`` with their proofs, ``machine``.

    Raises:
        Usage: the runtime package is not installed here.
    """
    try:
        from skerry_runtime.validation import validate_bundle
    except ImportError as error:
        raise Usage(f"validation needs skerry-runtime with a runtime: {error.name} is missing") from None
    result = validate_bundle(bundle.folder, timeout_s=timeout_s, digest=str(bundle.digest))
    return dict(json.loads(result.to_json()))
