"""A courier for tests: the real protocol on stdin and stdout, the repository a folder on disk.

``world.json`` in the folder named by SKERRY_TEST_WORLD says what it answers: ``document`` (text), ``floors``, ``bundles`` {digest: folder},
``signed_at``, ``down`` (every errand is unreachable), ``errors`` {verb: [kind, code, detail]}, ``flip`` (digests whose model file comes with one
bit changed), ``slow_s`` (before every answer), ``slow_fetch`` {digest: seconds} (before its files come). With ``folder`` in the request it is
the world of that folder. It downloads by copying, manifest last, as the real one does.
"""

import json
import os
import shutil
import sys
import time
from pathlib import Path


def come_slowly(seconds: float, size: int) -> None:
    """Says how much is here as the real courier does, evenly over the time."""
    began = time.monotonic()
    while (spent := time.monotonic() - began) < seconds:
        done = int(size * spent / seconds)
        progress = {"file": "model.onnx", "done": done, "size": size, "total_done": done, "total_size": size}
        print(json.dumps({"progress": progress}), flush=True)
        time.sleep(0.1)


def main() -> dict:
    verb, request = sys.argv[1], json.loads(sys.stdin.read())
    world = json.loads((Path(request.get("folder") or os.environ["SKERRY_TEST_WORLD"]) / "world.json").read_text())
    time.sleep(world.get("slow_s", 0))
    if world.get("down"):
        return {"error": {"kind": "transient", "code": "unreachable", "detail": "no route"}}
    if verb == "sync" and not request.get("folder"):
        said = {"membership": world.get("membership"), "self_error": world.get("self_error")}
        print(json.dumps({"progress": said}), flush=True)
    if verb in world.get("errors", {}):
        kind, code, detail = world["errors"][verb]
        return {"error": {"kind": kind, "code": code, "detail": detail}}
    if verb == "sync":
        return {
            "ok": {
                "tuf": {"timestamp": world.get("version", 1)}, "signed_at": world.get("signed_at", 0),
                "group": request["group"], "group_document": world.get("document"), "floors": world.get("floors"),
                "forced": world.get("forced"),
                "membership": world.get("membership"), "self_error": world.get("self_error"),
                "renew_at_s": world.get("renew_at_s"),
            }
        }  # fmt: skip
    if verb == "renew":
        return {"ok": {"expires_s": 4_000_000_000}}
    bundles = world.get("bundles", {})
    digest = request["digest"]
    if digest not in bundles:
        return {"error": {"kind": "rejected", "code": "not_in_catalog", "detail": digest}}
    folder = Path(bundles[digest])
    if verb == "manifest":
        return {"ok": {"manifest": (folder / "manifest.json").read_text()}}
    if verb == "fetch":
        come_slowly(world.get("slow_fetch", {}).get(digest, 0), sum(file["size"] for file in request["files"]))
        target = Path(request["state_dir"]) / "slots" / ".staging" / digest
        target.mkdir(parents=True, exist_ok=True)
        for file in request["files"]:
            shutil.copy(folder / file["path"], target / file["path"])
        if digest in world.get("flip", []):
            path = target / request["files"][-1]["path"]
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
        (target / "manifest.json").write_text(request["manifest"])
        if request.get("folder"):
            return {"ok": {"bytes": 0, "files": {"folder": len(request["files"])}}}
        return {"ok": {"bytes": sum(file["size"] for file in request["files"])}}
    return {"error": {"kind": "rejected", "code": "bad_request", "detail": verb}}


print(json.dumps(main()), flush=True)
