"""A file made of one that this device runs and a delta, where the repository has one: fewer bytes for the same file.

A delta is found by two names (ADR 0027): no answer, or any but a file of known length, means the whole file. What it is worth is
said by the result's hash alone; whatever goes wrong on the way ends with the whole file too, and what it may cost until then is
bounded: in bytes by the file that it stands for, in time, in room on the disk, and in processes that it ends.

A delta comes into ``slots/.parts`` like any other file that came in part; beside it, ``<key>.delta`` remembers its size and that it is no
good. ``<key>.patched`` is what is being made of it. What deltas of a file may cost in vain is one budget for it (``spending``).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from skerry_contract import bases, layout
from skerry_contract import manifest as manifests
from skerry_contract.errors import ContractError

from skerry_agent import durable, memory_folder
from skerry_agent.courier import parts, requests, resuming, spending, transport, watch
from skerry_agent.courier.acquiring import Wanted, is_whole
from skerry_agent.courier.meter import Meter
from skerry_agent.errors import AgentError, Degraded, Rejected, Transient

MOST_BASES = 2
"""So many files of this device are tried as the base of one."""
MOST_TRIES = 2
"""So often applying a delta of one file may be begun: of processes that they ended they get two and no more."""
MOST_ENDED = 6
"""So often a process that applies one may be ended in order without that counting as a try."""
_ATTEMPTS = 10
_IDLE_ATTEMPTS = 2
_LEAST_S, _BYTES_S, _MOST_S = 60.0, 64 * 1024, 2700.0
"""Applying may take so long, and a second more for so many bytes of the file; and never as long as a courier may be silent."""
_SMALL_BYTES = 4096
_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-\d{1,18}/(\d{1,18})")
_OWN = re.compile(r"\.?([0-9a-f]{64})\.(?:delta|delta\.new|patched|patched\.patching)")


class _State(msgspec.Struct, frozen=True, kw_only=True):
    """What is remembered of a delta. ``size``: bytes, 0 before it was announced; ``bad``: why it is not tried any more."""

    size: int = 0
    bad: str = ""


class _Base(NamedTuple):
    """A file of this device that a delta may lead from.

    Attributes:
        path: of its content, in the clear; plain: what that must be.
        sha256, size: by which it is named: of the ciphertext where it has one.
        bundle, key_id: where it is encrypted, of which bundle it is and what that one's manifest says of its content key; else empty.
    """

    path: Path
    sha256: str
    size: int
    plain: manifests.Plain
    bundle: str
    key_id: str


class _Useless(Rejected):
    """This delta will never do: it is not asked for again."""


class Patched:
    """As ``acquiring.Source``.

    Args:
        web: to the repository.
        url: the repository's root.
        slots: the folder of slots; parts lie in it.
        content_key: of the bundle that is fetched, when that is encrypted.
        lack: what is missing for so many more files of so many bytes on the disk; empty when they fit.

    Attributes:
        bytes: of deltas that came over the network in this run, also of those that were of no use.
        whole_bytes: of the files that were made of deltas.
        refused: reason -> how many files for which a delta was tried and the whole file is needed.
    """

    def __init__(
        self,
        web: transport.Connections,
        url: str,
        slots: Path,
        request: requests.Fetch,
        meter: Meter,
        lack: Callable[[int, int], str],
        content_key: bytes = b"",
    ) -> None:
        self._web = web
        self._url = url
        self._folder = slots / ".parts"
        self._meter = meter
        self._limits = request.limits
        self._lack = lack
        self._spending = spending.Spending(self._folder)
        self._bases = _bases(slots, request)
        self._sealed = None
        self.refused: dict[str, int] = {}
        if content_key:
            from skerry_agent.courier import sealed_delta

            self._sealed = sealed_delta.Sealed(request, content_key)
            if self._bases and not memory_folder.is_ours(Path(request.opened)):
                # It would come in vain: there is no place to open it in.
                self.refused, self._bases = {"no_memory_folder": len(self._bases)}, {}
        self._keys = {_key(base, target): target for target, found in self._bases.items() for base in found}
        self.bytes = 0
        self.whole_bytes = 0
        self._tidy(lambda key: key not in self._keys)

    def bring(self, wanted: Wanted, path: Path) -> bool:
        """As ``Source``. Raises nothing: there is the whole file."""
        for base in self._bases.get(wanted.hashes.get("sha256", ""), ()):
            key, before = _key(base, wanted.hashes["sha256"]), self._meter.received
            try:
                if self._bring_from(key, base, wanted, path):
                    self.whole_bytes += wanted.size
                    return True
            except OSError as error:
                self._count(durable.disk_error(error).code)
                # What came of it takes room that the whole file needs.
                self._discard(key)
            except Degraded as error:
                self._count(error.code)
                self._discard(key)
            except AgentError as error:
                self._count(error.code)
            except MemoryError:
                self._count("not_enough_memory")
                self._discard(key)
            finally:
                self.bytes += self._meter.received - before
                # An alarm that rang goes on ringing.
                self._meter.wind()
        return False

    def done(self) -> None:
        """Every file is here, in whatever way: what is left of deltas goes, for good."""
        self._tidy(lambda _key: True)
        for key, target in self._keys.items():
            self._remove(key)
            self._spending.forget(target)
        if self._folder.is_dir():
            # The next fetch may be long ahead: power that fails until then must not bring back what went.
            durable.sync_folder(self._folder)

    def told(self) -> dict[str, Any]:
        """``delta_bytes``, ``patched_bytes`` and ``refused``; empty where no delta was asked for."""
        if not (self.bytes or self.whole_bytes or self.refused):
            return {}
        return {"delta_bytes": self.bytes, "patched_bytes": self.whole_bytes, "refused": self.refused}

    def _discard(self, key: str) -> None:
        with contextlib.suppress(OSError):
            # A disk that takes nothing more must not keep what it has.
            self._spending.charge(self._keys[key], size_bytes=(self._folder / key).stat().st_size)
        self._remove(key)

    def _remove(self, key: str) -> None:
        for side in ("", ".etag", ".lost"):
            (self._folder / (key + side)).unlink(missing_ok=True)

    def _count(self, code: str) -> None:
        self.refused[code] = self.refused.get(code, 0) + 1

    def _tidy(self, gone: Callable[[str], bool]) -> None:
        busy: dict[str, bool] = {}
        for entry in list(self._folder.iterdir()) if self._folder.is_dir() else []:
            found = _OWN.fullmatch(entry.name)
            if found is None or not gone(found[1]):
                continue
            key = found[1]
            if key not in busy:
                # Another courier, of a shadow say, may be making a file of it.
                busy[key] = parts.is_held(self._folder, key)
            if not busy[key]:
                entry.unlink(missing_ok=True)
        self._spending.tidy(self._bases)

    def _bring_from(self, key: str, base: _Base, wanted: Wanted, path: Path) -> bool:
        state = self._load(key)
        if state.bad:
            return False
        with self._meter.own_work():
            held = is_whole(
                base.path, Wanted(name=wanted.name, size=base.plain.size, hashes={"sha256": base.plain.sha256})
            )
        if not held:
            # A slot that rots is another's matter; no delta fits it.
            return False
        base_key = b""
        if base.bundle and self._sealed is not None:
            with self._meter.own_work():
                base_key = self._sealed.base_key(base.bundle, base.key_id)
            if not base_key:
                return False
        with parts.held(self._folder, Wanted(name=wanted.name, size=0, hashes={"sha256": key})) as part:
            try:
                state = self._download(part, key, state, base, wanted)
                if not state.size:
                    return False
                self._apply(key, base, wanted, path, base_key)
            except _Useless as error:
                self._store(key, _State(bad=error.code))
                self._spending.charge(wanted.hashes["sha256"], size_bytes=part.size)
                os.truncate(self._folder / key, 0)
                raise
            os.truncate(self._folder / key, 0)
        for name in (f"{key}.delta", f"{key}.etag", f"{key}.lost"):
            (self._folder / name).unlink(missing_ok=True)
        self._spending.forget(wanted.hashes["sha256"])
        return True

    # --- the delta ---------------------------------------------------------------------------------------------------

    def _download(self, part: parts.Part, key: str, state: _State, base: _Base, wanted: Wanted) -> _State:
        """Until the delta is here. Returns its state; without a size when there is none.

        Raises:
            Transient: it does not come now, though it is there; what came is kept.
        """
        idle = 0
        for attempt in range(_ATTEMPTS):
            if state.size and part.size == state.size:
                return state
            before = self._meter.received
            self._meter.wind()
            try:
                state = self._one_connection(part, key, base, wanted)
                if not state.size:
                    return state
            except watch.Overdue:
                # The whole file may come from a cache that is nearer.
                raise
            except Transient as error:
                idle = 0 if self._meter.received > before else idle + 1
                patience = _ATTEMPTS if isinstance(error, transport.Overloaded) else _IDLE_ATTEMPTS
                if idle >= min(patience, self._limits.idle_attempts) or attempt + 1 == _ATTEMPTS:
                    raise
                state = self._load(key)
                self._meter.pause(resuming.pause_s(self._limits.pause_s, idle, error))
        raise Transient("unreachable", f"{wanted.name}: no delta after {_ATTEMPTS} connections")

    def _one_connection(self, part: parts.Part, key: str, base: _Base, wanted: Wanted) -> _State:
        url = f"{self._url}/{layout.delta(base.sha256, wanted.hashes['sha256'])}"
        if part.size and not part.tag:
            # A delta may be made anew under its name: without a validator nothing says that the rest belongs to this beginning.
            self._drop(part, wanted)
        offset = part.size
        headers = {"Range": f"bytes={offset}-", "If-Range": part.tag} if offset else {}
        with self._web.open("GET", url, headers=headers) as response:
            if response.status == 416:
                self._drop(part, wanted)
                raise Transient("unreachable", f"{url}: HTTP 416, beginning anew")
            if response.status == 206:
                match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
                if match is None or int(match[1]) != offset:
                    raise Transient("unreachable", f"{url}: another range than bytes {offset}- came back")
                total = int(match[2])
            elif response.status == 200:
                total = response.length or 0
                if offset:
                    self._drop(part, wanted)
                    offset = 0
            elif transport.is_overloaded(response.status):
                # A short overload must not have a whole fleet fetch whole files in its place.
                raise transport.Overloaded(url, response)
            else:
                self._count("delta_missing")
                if response.length is not None and response.length <= _SMALL_BYTES:
                    # Read to its end, so that the next request finds the connection open.
                    transport.read(response, _SMALL_BYTES, url)
                return _State()
            if not total:
                # Its end could not be told from a cut.
                return _State()
            if total >= wanted.size:
                raise _Useless("delta_too_large", f"{url}: {total} bytes for a file of {wanted.size}")
            spent_bytes = self._spending.of(wanted.hashes["sha256"]).size_bytes
            if total + spent_bytes >= wanted.size:
                raise _Useless("delta_wasted", f"{url}: {total} bytes, and {spent_bytes} of others came in vain before")
            here = parts.sizes(self._folder).get(wanted.key, 0)
            if total - offset >= wanted.size - here:
                # The rest of the whole file, which came in part before, is less.
                return _State()
            lack = self._lack(2, total - offset + wanted.size)
            if lack:
                raise Degraded("not_enough_disk", lack, advice="make room on the disk")
            state = _State(size=total)
            self._store(key, state)
            part.came_under(response.headers.get("ETag", ""))
            done = offset
            with part.growing() as descriptor:
                for piece in transport.pieces(response, url):
                    done += len(piece)
                    if done > total:
                        raise _Useless("delta_too_large", f"{url}: more than the {total} bytes that were announced")
                    _write(descriptor, piece)
                    # In the terms of the file: so far as the delta is.
                    self._meter.came(wanted, min(wanted.size - 1, wanted.size * done // total), len(piece))
            if done < total:
                raise Transient("unreachable", f"{url}: ended after {done} of {total} bytes")
        return state

    def _drop(self, part: parts.Part, wanted: Wanted) -> None:
        self._spending.charge(wanted.hashes["sha256"], size_bytes=part.size)
        part.drop()
        if self._spending.of(wanted.hashes["sha256"]).size_bytes > wanted.size:
            raise _Useless("delta_wasted", f"{wanted.name}: more bytes of its delta came in vain than it has itself")

    def _apply(self, key: str, base: _Base, wanted: Wanted, path: Path, base_key: bytes) -> None:
        tries = self._spending.of(wanted.hashes["sha256"]).tries
        if tries >= MOST_TRIES:
            raise _Useless("delta_crashed", f"{wanted.name}: applying its delta ended the process {tries} times")
        try:
            with watch.ended_in_order():
                # Remembered on disk before it is begun, so that what ends this process is not begun for ever.
                self._spending.charge(wanted.hashes["sha256"], tries=1)
                self._make(key, base, wanted, path, base_key)
        except SystemExit:
            # It was not the delta: the network changed, say, or the agent is stopped. But where it never gets to its end, the whole file has to do.
            now = self._spending.of(wanted.hashes["sha256"])
            if now.ended < MOST_ENDED:
                self._spending.charge(wanted.hashes["sha256"], tries=tries - now.tries, ended=1)
            raise

    def _make(self, key: str, base: _Base, wanted: Wanted, path: Path, base_key: bytes) -> None:
        from skerry_runtime import delta

        made = self._folder / f"{key}.patched"
        try:
            with self._meter.own_work(min(_LEAST_S + wanted.size / _BYTES_S, _MOST_S)):
                patch, sha256 = self._folder / key, wanted.hashes["sha256"]
                if self._sealed is not None:
                    self._sealed.apply(base.path, patch, made, base_key=base_key, base=base.sha256, target=sha256)
                else:
                    delta.apply(base.path, patch, made, sha256=sha256, size=wanted.size)
                if not is_whole(made, wanted):
                    raise _Useless("delta_wrong", f"{wanted.name}: what its delta gives is another file")
                durable.sync_file(made)
                made.replace(path)
                durable.sync_folder(path.parent)
        except delta.DeltaError as error:
            raise _Useless("delta_wrong", f"{wanted.name}: {error}") from None
        except Transient as error:
            # The alarm: no peer is at fault, the delta takes too long here.
            raise _Useless("delta_slow", f"{wanted.name}: {error.detail}") from None
        finally:
            made.unlink(missing_ok=True)

    # --- what is remembered --------------------------------------------------------------------------------------------

    def _load(self, key: str) -> _State:
        try:
            return msgspec.json.decode((self._folder / f"{key}.delta").read_bytes(), type=_State)
        except (OSError, msgspec.MsgspecError):
            return _State()

    def _store(self, key: str, state: _State) -> None:
        durable.write(self._folder / f"{key}.delta", msgspec.json.encode(state))


def _bases(slots: Path, request: requests.Fetch) -> dict[str, Sequence[_Base]]:
    """sha256 of each wanted file -> what of this device it may be made of, the likeliest first."""
    try:
        target = manifests.parse(request.manifest.encode()).variant(request.variant)
    except (ContractError, KeyError):
        return {}
    # A folder in memory that is not ours holds nothing.
    opened = Path(request.opened if request.opened and memory_folder.is_ours(Path(request.opened)) else "/nowhere")
    found: dict[str, list[_Base]] = {}
    for one in request.held:
        manifest = _manifest(slots, one.digest)
        held = next((v for v in manifest.variants if v.id == one.variant), None) if manifest else None
        if manifest is None or held is None:
            continue
        bundle, key_id = (one.digest, manifest.encryption.key_id) if manifest.encryption is not None else ("", "")
        for file in target.files:
            base = bases.base_of(file, target, held)
            if base is None:
                continue
            listed = found.setdefault(file.sha256, [])
            if len(listed) < MOST_BASES and all(base.sha256 != known.sha256 for known in listed):
                # What is in an encrypted file lies in memory, if anywhere.
                folder = slots if base.plain is None else opened
                path = folder / one.digest / base.path
                listed.append(_Base(path, base.sha256, base.size, base.content, bundle, key_id))
    return {sha256: tuple(listed) for sha256, listed in found.items()}


def _manifest(slots: Path, digest: str) -> manifests.Manifest | None:
    try:
        data = (slots / digest / manifests.MANIFEST_FILE).read_bytes()
        return manifests.parse(data) if manifests.digest(data) == digest else None
    except (OSError, ContractError):
        return None


def _key(base: _Base, target: str) -> str:
    """A name for a delta among the parts."""
    return hashlib.sha256(f"delta {base.sha256} {target}".encode()).hexdigest()


def _write(descriptor: int, piece: bytes) -> None:
    left = memoryview(piece)
    while left:
        left = left[os.write(descriptor, left) :]
