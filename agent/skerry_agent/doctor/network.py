"""The other side: the server over TLS, the broker over mutual TLS."""

from __future__ import annotations

import http.client
import socket
import ssl
import urllib.parse
from collections.abc import Iterator

from skerry_agent.doctor.finding import NET_S, Finding, Patient
from skerry_agent.link import tls_context

_REFUSAL_S = 1.0
"""A broker that does not want the certificate says so after the handshake, within a round trip."""


_YOUNG_S = 60.0
"""So long after its start an agent may be without session and sync."""


def check_fleet(patient: Patient) -> Iterator[Finding]:
    """What the running agent hears from the fleet: that a port answers says nothing about this device."""
    status = patient.status
    if status is None:
        return
    link, sync = status["link"], status["sync"]
    young = status["uptime_s"] < _YOUNG_S
    said: list[tuple[bool, str, str]] = []
    if sync.get("membership"):
        said.append(
            (
                True,
                f"the server refuses this device: {sync['membership']}",
                "ask the operator: revoked, or enrolled anew elsewhere",
            )
        )
    refused = sync.get("certificate", {}).get("code", "")
    if refused not in ("", "unreachable", "timeout"):
        detail = f"the server does not renew this device's certificate: {refused}"
        said.append((True, detail, f"an operator allows it: skerry device renew {status['device']}"))
    if not link["connected"]:
        said.append((not young, "the agent has no session with the broker", "see the agent's log: link down"))
    elif not link["server_online"]:
        said.append(
            (False, "the broker is there and the server does not listen", "nothing is lost; it is the operator's turn")
        )
    if sync["code"]:
        said.append((True, f"the last sync failed: {sync['code']}: {sync['detail']}", "docs/reference/reason-codes.md"))
    elif not sync["at_ms"]:
        said.append((not young, "no sync yet", "see the agent's log"))
    for fails, detail, advice in sorted(said, key=lambda one: one[0]):
        yield Finding(check="fleet", verdict="fail" if fails else "warn", detail=detail, advice=advice)
    if not said:
        yield Finding(check="fleet", verdict="ok", detail="connected; the server listens; the last sync went well")


def check_server(patient: Patient) -> Iterator[Finding]:
    """Whether the server answers under a certificate of the fleet's CA."""
    found = patient.identity
    if found is None:
        return
    url = urllib.parse.urlsplit(found.server_url)
    host, port = url.hostname or "", url.port or 443
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_verify_locations(found.fleet_ca)
    connection = http.client.HTTPSConnection(host, port, timeout=NET_S, context=context)
    try:
        connection.request("GET", f"{url.path}/healthz")
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        yield _unreachable("server", f"{host}:{port}", error)
        return
    finally:
        connection.close()
    if status == 200:
        yield Finding(check="server", verdict="ok", detail=f"{found.server_url} answers, by the fleet's CA")
    else:
        yield Finding(
            check="server",
            verdict="fail",
            detail=f"{found.server_url}/healthz: {status}",
            advice="see the server's log, or the proxy's in front of it",
        )


def check_broker(patient: Patient) -> Iterator[Finding]:
    """Whether the broker takes the device's certificate."""
    found = patient.identity
    if found is None:
        return
    where = f"{found.mqtt_host}:{found.mqtt_port}"
    try:
        with (
            socket.create_connection((found.mqtt_host, found.mqtt_port), NET_S) as raw,
            tls_context(found).wrap_socket(raw, server_hostname=found.mqtt_host) as secured,
        ):
            # No MQTT: a session under the device's name would end the agent's own. In TLS 1.3 the refusal of a client
            # certificate comes after the handshake; a broker that is content waits for us to speak.
            secured.settimeout(_REFUSAL_S)
            try:
                content = secured.recv(1) != b""
            except TimeoutError:
                content = True
    except (OSError, ValueError) as error:
        yield _unreachable("broker", where, error)
        return
    if content:
        yield Finding(check="broker", verdict="ok", detail=f"{where} takes the device's certificate")
    else:
        yield Finding(
            check="broker", verdict="fail", detail=f"{where} closed the connection", advice="see the broker's log"
        )


def _unreachable(check: str, where: str, error: Exception) -> Finding:
    if isinstance(error, ssl.SSLCertVerificationError):
        advice = "the other side shows a certificate that the fleet's CA did not sign, or the clock is wrong"
    elif isinstance(error, ssl.SSLError):
        advice = "it refuses the device's certificate: renewed, revoked or expired; ask the operator"
    elif isinstance(error, socket.gaierror):
        advice = "look at the name service (resolvectl) and the address in the configuration"
    else:
        advice = "look at the network, the firewall, and whether it runs; models go on without it"
    return Finding(check=check, verdict="fail", detail=f"{where}: {error}", advice=advice)
