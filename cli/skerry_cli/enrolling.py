"""Enrolment tokens: the server's secret, completed with the trust that the server must not decide."""

from __future__ import annotations

from typing import Any

from skerry_contract import enrolment

from skerry_cli.client import Api


def complete_token(api: Api, root_sha256: str, wish: dict[str, Any]) -> str:
    """Asks the server for a token and adds what the server must not decide."""
    issued = api.post("/api/v1/enrolment-tokens", {name: value for name, value in wish.items() if value is not None})
    return enrolment.build(
        enrolment.Enrolment(
            server_url=api.server, token=str(issued["token"]), ca_sha256=api.ca_sha256, root_sha256=root_sha256
        )
    )
