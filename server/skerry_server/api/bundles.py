"""Routes: bundles and their files."""

from __future__ import annotations

import base64
import binascii
from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Header, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from skerry_contract import ids
from skerry_contract import manifest as m
from sqlalchemy import Connection, select, tuple_

from skerry_server import content_keys, groups, registry
from skerry_server.api.bodies import Route
from skerry_server.api.context import After, Ctx, Engineer, Limit, Operator, RawBody, Viewer, page, read_cursor
from skerry_server.config import EVERY_MODEL
from skerry_server.core.bundles import Action
from skerry_server.db import tables as t
from skerry_server.db.engine import reading, writing
from skerry_server.errors import Conflict, Invalid, NotFound, TooLarge, Unavailable
from skerry_server.validation import Outcome

router = APIRouter(prefix="/api/v1", tags=["bundles"], route_class=Route)
_PIECE_BYTES = 1 << 20
_OF_THE_DISK = frozenset({"hash_mismatch", "size_mismatch", "file_missing", "model_damaged"})
Clear = Annotated[bool, Query(description="In the clear is meant, though another version is encrypted")]
Again = Annotated[bool, Query(description="Also a bundle that was rejected")]


class Reason(BaseModel):
    """Why."""

    model_config = ConfigDict(extra="forbid")
    reason: str = Field(default="", max_length=2000)


def _shape(row: dict[str, Any]) -> dict[str, Any]:
    names = ("digest", "model", "version", "state", "reason", "submitter", "pushed_ms", "validation")
    return {name: row[name] for name in names} | {"signed": row["signature"] is not None}


@router.post("/bundles", summary="Push a bundle's manifest as a draft")
def push(
    context: Ctx,
    caller: Engineer,
    body: RawBody,
    x_skerry_signature: Annotated[str | None, Header(description="base64 of model.sig")] = None,
    clear: Clear = False,
) -> dict[str, Any]:
    """The body is the manifest's bytes. The answer names the files that are not here yet, and of an encrypted bundle whether its
    content key is here. The same manifest again is fine;
    another bundle under the same model and version is refused with 409, and so is one in the clear of a model that has an encrypted
    version (`encrypted_before`), unless that is meant; of a model in `policy.encrypted_models` it is refused with 422 whatever is meant.
    """
    try:
        signature = None if x_skerry_signature is None else base64.b64decode(x_skerry_signature, validate=True)
    except binascii.Error:
        raise Invalid("bad_request", "header X-Skerry-Signature: wanted base64") from None
    asked = context.settings.policy.encrypted_models
    with writing(context.engine) as conn:
        registry.require_encryption(conn, body, every=EVERY_MODEL in asked, models=asked, clear=clear)
        pushed = registry.push(
            conn,
            manifest=body,
            signature=signature,
            actor=caller.actor,
            submitter=caller.name,
            now_ms=context.now_ms(),
        )
        manifest = m.parse(body)
        pushed |= {"missing": _missing(context, conn, manifest)}
        if manifest.encryption is not None:
            pushed |= {"content_key": _readable(context, conn, pushed["digest"])}
        return pushed


def _readable(context: Ctx, conn: Connection, digest: str) -> bool:
    """Whether the content key of an encrypted bundle is here, and not sealed with a release key that was lost."""
    try:
        content_keys.find(conn, context.release_key, digest)
    except (NotFound, Unavailable):
        return False
    return True


def _missing(context: Ctx, conn: Connection, manifest: m.Manifest) -> list[str]:
    """The files that are not here: never sent, or lost from this server's disk since."""
    lost = {file.sha256 for file in manifest.files() if context.repository.blob_size(file.sha256) != file.size}
    return sorted(lost | set(registry.missing(conn, manifest)))


@router.put("/blobs/{sha256}", summary="Upload one file that a bundle lists")
async def put_blob(context: Ctx, caller: Engineer, sha256: str, request: Request) -> dict[str, Any]:
    """The raw bytes, streamed; size and sha256 are checked against the draft."""
    ids.sha256_hex(sha256)
    size = await to_thread.run_sync(_size_to_take, context, sha256)
    if size is None:
        return {"sha256": sha256, "stored": False}
    writer = await to_thread.run_sync(context.repository.open_blob, sha256)
    with writer:
        piece = bytearray()
        async for part in request.stream():
            piece += part
            if writer.size + len(piece) > size:
                raise TooLarge(f"blob {sha256}", size)
            if len(piece) >= _PIECE_BYTES:
                await to_thread.run_sync(writer.write, bytes(piece))
                piece.clear()
        writer.write(bytes(piece))
        if writer.size != size:
            raise Invalid("size_mismatch", f"blob {sha256}: wanted {size} bytes, got {writer.size}")
        await to_thread.run_sync(context.repository.finish_blob, writer, sha256)
    await to_thread.run_sync(_note_blob, context, sha256, size, caller.actor)
    return {"sha256": sha256, "stored": True}


def _size_to_take(context: Ctx, sha256: str) -> int | None:
    with reading(context.engine) as conn:
        held = conn.execute(select(t.blobs.c.size).where(t.blobs.c.sha256 == sha256)).scalar()
        if held is not None and context.repository.blob_size(sha256) == held:
            return None
        return registry.expected_size(conn, sha256)


def _note_blob(context: Ctx, sha256: str, size: int, actor: str) -> None:
    with writing(context.engine) as conn:
        registry.note_blob(conn, sha256=sha256, size=size, actor=actor, now_ms=context.now_ms())


@router.post("/bundles/{digest}/validate", summary="Validate a draft in a child process")
async def validate(context: Ctx, caller: Engineer, digest: str, again: Again = False) -> dict[str, Any]:
    """A draft becomes `validated` or `rejected`; in any other state this answers what was found before. `again` validates a
    rejected one once more: what rejected it may have been this server, with too little time or memory.
    """
    async with context.validator.turns.of(digest) as in_turn:
        row: dict[str, Any] = await in_turn(lambda: _validate(context, caller.actor, digest, again))
    return {"digest": digest} | {name: row[name] for name in ("state", "reason", "validation")}


def _validate(context: Ctx, actor: str, digest: str, again: bool) -> dict[str, Any]:
    with reading(context.engine) as conn:
        row = registry.require(conn, digest)
        manifest = m.parse(row["manifest"])
        lacking = _missing(context, conn, manifest)
        key = None
        if manifest.encryption is not None and not lacking:
            if not content_keys.has(conn, digest):
                raise Conflict("content_key_missing", "the bundle is encrypted, and its content key is not here yet")
            key = content_keys.find(conn, context.release_key, digest)
    if row["state"] == "draft" or (again and row["state"] == "rejected"):
        if lacking:
            raise Conflict("incomplete", f"{len(lacking)} files of the bundle are not here yet", missing=lacking)
        outcome = context.validator.validate(digest, row["manifest"], row["signature"], key)
        if outcome.code in _OF_THE_DISK:
            files = {file.sha256: file.size for file in m.parse(row["manifest"]).files()}
            damaged = context.repository.drop_damaged_blobs(files)
            if damaged:
                # What was sent had the right sha256: this server's disk changed it, and nothing is said about the bundle.
                raise Conflict(
                    "incomplete", f"{len(damaged)} files were damaged on this server's disk", missing=damaged
                )
        _note_outcome(context, digest, row["state"], outcome, actor)
        with reading(context.engine) as conn:
            row = registry.require(conn, digest)
    return row


def _note_outcome(context: Ctx, digest: str, before: str, outcome: Outcome, actor: str) -> None:
    with writing(context.engine) as conn:
        if registry.require(conn, digest)["state"] != before:
            return  # somebody moved it meanwhile
        registry.move(
            conn,
            digest=digest,
            action="pass" if outcome.good else "reject",
            reason=f"{outcome.code}: {outcome.reason}" if outcome.code else outcome.reason,
            actor=actor,
            now_ms=context.now_ms(),
            validation=outcome.report,
        )
    # A catalog that lists it may have been installed before.
    context.publication.align()


@router.get("/bundles", summary="List bundles")
def list_bundles(
    context: Ctx,
    _caller: Viewer,
    model: Annotated[str | None, Query(max_length=63)] = None,
    after: After = None,
    limit: Limit = 100,
) -> dict[str, Any]:
    c = t.bundles.c
    query = select(t.bundles).order_by(c.pushed_ms, c.digest).limit(limit)
    if model is not None:
        query = query.where(c.model == model)
    last = read_cursor(after, int, str)
    if last is not None:
        query = query.where(tuple_(c.pushed_ms, c.digest) > tuple_(*last))
    with reading(context.engine) as conn:
        items = [_shape(dict(row)) for row in conn.execute(query).mappings()]
    return page(items, limit, *((items[-1]["pushed_ms"], items[-1]["digest"]) if items else ()))


@router.get("/bundles/{digest}", summary="One bundle")
def get_bundle(context: Ctx, _caller: Viewer, digest: str) -> dict[str, Any]:
    with reading(context.engine) as conn:
        row = registry.require(conn, digest)
        return _shape(row) | {
            "missing": _missing(context, conn, m.parse(row["manifest"])),
            "used_by": registry.users(conn, digest),
        }


@router.get("/bundles/{digest}/manifest", summary="The manifest's bytes", response_class=Response)
def get_manifest(context: Ctx, _caller: Viewer, digest: str) -> Response:
    with reading(context.engine) as conn:
        return Response(registry.require(conn, digest)["manifest"], media_type="application/json")


@router.get("/bundles/{digest}/signature", summary="The bytes of model.sig", response_class=Response)
def get_signature(context: Ctx, _caller: Viewer, digest: str) -> Response:
    """404 when the bundle was pushed without one. Whose it is, whoever asks must check."""
    with reading(context.engine) as conn:
        signature = registry.require(conn, digest)["signature"]
    if signature is None:
        raise NotFound("signature of bundle", digest)
    return Response(signature, media_type="application/json")


@router.put("/bundles/{digest}/signature", summary="The signature of a pushed bundle, of any length")
def put_signature(context: Ctx, caller: Engineer, digest: str, body: RawBody) -> dict[str, Any]:
    """The bytes of model.sig, where it is longer than a header may be. As with `POST /bundles`, another one is taken only as long as the bundle
    is a draft or rejected: later somebody may rely on the one that is here.
    """
    with writing(context.engine) as conn:
        held = registry.require(conn, digest)
        registry.push(
            conn,
            manifest=held["manifest"],
            signature=body,
            actor=caller.actor,
            submitter=held["submitter"],
            now_ms=context.now_ms(),
        )
        taken = registry.require(conn, digest)["signature"] == body
    if not taken:
        raise Conflict("signed", f"bundle {digest} has another signature, and is {held['state']}")
    return {"digest": digest, "signed": True}


@router.post("/bundles/{digest}/deprecate", summary="No new rollouts of it")
def deprecate(context: Ctx, caller: Operator, digest: str, why: Reason | None = None) -> dict[str, Any]:
    return _move(context, caller.actor, digest, "deprecate", why)


@router.post("/bundles/{digest}/retire", summary="End it for good; refused while something runs it")
def retire(context: Ctx, caller: Operator, digest: str, why: Reason | None = None) -> dict[str, Any]:
    return _move(context, caller.actor, digest, "retire", why)


def _move(context: Ctx, actor: str, digest: str, action: Action, why: Reason | None) -> dict[str, Any]:
    reason = why.reason if why else ""
    with writing(context.engine) as conn:
        state = registry.move(conn, digest=digest, action=action, reason=reason, actor=actor, now_ms=context.now_ms())
        # Groups may name it as a version to pass through.
        groups.touch_who_run(conn, [digest])
    context.wake()
    return {"digest": digest, "state": state}
