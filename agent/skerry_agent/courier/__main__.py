"""``python -m skerry_agent.courier <verb>``: one JSON object in, JSON lines out.

Any number of ``{"progress": {...}}``, then one ``{"ok": {...}}`` or ``{"error": {"kind", "code", "detail", "after_s"}}``; exit code 0 for
both. Another exit code is a crash, with its trace on stderr. The verbs are ``enrol sync manifest fetch unseal renew logs``.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from skerry_agent.courier import requests, watch
from skerry_agent.errors import AgentError, Degraded, Rejected

VERBS = ("enrol", "sync", "manifest", "fetch", "unseal", "renew", "logs")


def run(verb: str, data: bytes) -> dict[str, Any]:
    """Does one errand; returns what goes under ``ok``.

    Raises:
        AgentError: what goes under ``error``.
    """
    # Each branch imports what it needs and no more: a fleet's worth of couriers starts on small machines.
    if verb == "fetch":
        from skerry_agent.courier import download

        return download.fetch(requests.parse(requests.Fetch, data), lambda progress: emit({"progress": progress}))
    if verb == "unseal":
        from skerry_agent.courier import unsealing

        return unsealing.unseal(requests.parse(requests.Unseal, data))
    if verb == "sync":
        from skerry_agent.courier import lookup

        sync = requests.parse(requests.Sync, data)
        with watch.Watch(sync.limits.errand_s):
            return lookup.sync(sync, lambda said: emit({"progress": said}))
    if verb == "manifest":
        from skerry_agent.courier import lookup

        manifest = requests.parse(requests.Manifest, data)
        with watch.Watch(manifest.limits.errand_s):
            return lookup.manifest(manifest)
    if verb == "enrol":
        from skerry_agent.courier import enrolment

        enrol = requests.parse(requests.Enrol, data)
        with watch.Watch(enrol.limits.errand_s):
            return enrolment.enrol(enrol)
    if verb == "renew":
        from skerry_agent.courier import enrolment

        renew = requests.parse(requests.Renew, data)
        with watch.Watch(renew.limits.errand_s):
            return enrolment.renew(renew)
    if verb == "logs":
        from skerry_agent.courier import logs

        asked = requests.parse(requests.Logs, data)
        with watch.Watch(asked.limits.errand_s):
            return logs.send(asked)
    raise Rejected("bad_request", f"verb: wanted one of {', '.join(VERBS)}, got {verb!r}")


def emit(message: dict[str, Any]) -> None:
    """Writes one line at once: the supervisor reads while we work."""
    sys.stdout.write(json.dumps(message, separators=(",", ":")) + "\n")
    sys.stdout.flush()


def main() -> None:
    """The process."""
    if len(sys.argv) != 2:
        sys.exit(f"usage: python -m skerry_agent.courier {'|'.join(VERBS)} < request.json")
    try:
        answer: dict[str, Any] = {"ok": run(sys.argv[1], sys.stdin.buffer.read())}
    except AgentError as error:
        kind = "rejected" if isinstance(error, Rejected) else "degraded" if isinstance(error, Degraded) else "transient"
        answer = {"error": {"kind": kind, "code": error.code, "detail": error.detail}}
        if error.after_s:
            answer["error"]["after_s"] = error.after_s
    emit(answer)


if __name__ == "__main__":
    main()
