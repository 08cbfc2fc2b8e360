"""Routes that devices call: enrolment, nonces, membership, renewal."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Response
from pydantic import BaseModel, Field

from skerry_server import content_keys, device_orders, devices, requested_logs
from skerry_server.api.bodies import Route
from skerry_server.api.context import Ctx, RawBody, SignedByDevice
from skerry_server.db.engine import reading, writing

router = APIRouter(prefix="/device/v1", tags=["device"], route_class=Route)


class Enrolment(BaseModel):
    """A device's first request. The server takes the public key from the CSR, and nothing else."""

    token: str = Field(max_length=200)
    csr: str = Field(description="PEM of a PKCS#10 request with a P-256 or Ed25519 key")
    encryption_key: str | None = Field(
        default=None,
        max_length=content_keys.MAX_PEM_CHARS,
        description="PEM of a P-256 public key that content keys of encrypted bundles are wrapped for",
    )
    device_id: str | None = Field(
        default=None, description="For a token with a prefix; else the CSR's CN, or the token's id"
    )


class Renewal(BaseModel):
    """A request for a new certificate; the token in the header is signed with the old key and covers this body."""

    csr: str


@router.post("/enrol", summary="Enter the fleet with a token and a CSR")
def enrol(context: Ctx, wanted: Enrolment) -> dict[str, Any]:
    with writing(context.engine) as conn:
        enrolled = devices.enrol(
            conn,
            context.authority,
            token=wanted.token,
            csr_pem=wanted.csr,
            asked_id=wanted.device_id,
            now_ms=context.now_ms(),
        )
        if wanted.encryption_key is not None:
            # A token that was used up already brings the same device its answer once more, and no other key.
            content_keys.note_device_key(
                conn, enrolled.device, wanted.encryption_key, now_ms=context.now_ms(), replace=not enrolled.renewed
            )
    context.refresh_broker_users()
    return {
        "device_id": enrolled.device,
        "group": enrolled.group,
        "certificate": enrolled.issued.certificate_pem,
        "ca": context.authority.pem,
        "mqtt": context.mqtt,
        "repository_url": f"{context.url}/repository",
    }


@router.get("/ca", summary="The fleet's CA certificate, PEM", response_class=Response)
def fleet_ca(context: Ctx) -> Response:
    """For a newcomer that trusts nobody yet: it believes the certificate for the fingerprint in its enrolment token alone."""
    return Response(context.authority.pem, media_type="application/x-pem-file")


@router.get("/nonce", summary="A nonce for one signed request")
def nonce(context: Ctx) -> dict[str, Any]:
    """`time` is the server's, seconds since 1970: a device with a wrong clock dates its token by it."""
    now_ms = context.now_ms()
    return {"nonce": context.nonces.give(now_ms), "time": now_ms / 1000}


@router.get("/self", summary="The device's own group and tags, and whether its log is asked for")
def own(context: Ctx, device: SignedByDevice) -> dict[str, Any]:
    """`logs` is the number of the request that waits for `POST /device/v1/logs/{number}`; null for none. `orders`: number by kind. `alone`: no other device is enrolled, so that nothing is won by waiting for a turn."""
    with reading(context.engine) as conn:
        row = devices.require(conn, device)
        logs = requested_logs.waiting(conn, device, context.now_ms())
        orders = device_orders.standing(conn, device, row["group"], context.now_ms())
        alone = devices.is_alone(conn)
    return {
        "device_id": device,
        "group": row["group"],
        "tags": row["tags"],
        "version": row["membership_version"],
        "logs": logs,
        "orders": orders,
        "alone": alone,
    }


@router.post("/logs/{number}", summary="The last lines of the device's log, as an operator asked")
def send_logs(context: Ctx, device: SignedByDevice, number: int, body: RawBody) -> dict[str, Any]:
    """The body is gzip of lines of JSON, at most 128 KiB, 1 MiB when it is unpacked."""
    with writing(context.engine) as conn:
        refusal = requested_logs.take(conn, device=device, number=number, body=body, now_ms=context.now_ms())
    if refusal is not None:
        raise refusal
    return {"number": number, "taken": True}


@router.post("/renew", summary="A new certificate")
def renew(context: Ctx, device: SignedByDevice, wanted: Renewal) -> dict[str, Any]:
    with writing(context.engine) as conn:
        issued = devices.renew(
            conn, context.authority, device=device, csr_pem=wanted.csr, now_ms=context.now_ms(),
            grace_s=context.settings.devices.renewal_grace_s,
        )  # fmt: skip
    # With another key the old certificate is out at once; the device reconnects with the new one.
    context.refresh_broker_users()
    return {"device_id": device, "certificate": issued.certificate_pem, "ca": context.authority.pem}
