"""From which file that a device holds a file of another bundle is patched. One rule for both sides, so that nobody is asked in vain.

The server makes deltas by it, the device asks for them by it; neither tells the other. Where they disagree, or nothing was made, a
device takes the whole file.
"""

from __future__ import annotations

from skerry_contract.manifest import File, Manifest, Variant

LEAST_BYTES = 4096
"""A smaller file is fetched whole: the request costs more than a delta could save."""


def base_of(file: File, target: Variant, held: Variant) -> File | None:
    """The file of ``held`` that ``file`` of ``target`` is patched from: of the same path, else model from model of one runtime.

    None where there is nothing to patch from, where the same bytes lie there already, and for files below ``LEAST_BYTES``. Of encrypted
    files it is what is in them that is patched; what is secret is never the base of what is not.
    """
    if file.size < LEAST_BYTES or any(own.sha256 == file.sha256 for own in held.files):
        return None
    by_path = {own.path: own for own in held.files}
    found = by_path.get(file.path)
    if found is None and file.path == target.model and target.runtime == held.runtime:
        found = by_path.get(held.model)
    return found if found is not None and found.size > 0 and (found.plain is None or file.plain is not None) else None


def variant_after(manifest: Manifest, held: Variant) -> Variant | None:
    """The variant of another bundle that a device will probably run which runs ``held`` now: of that name, else of that runtime."""
    named = [variant for variant in manifest.variants if variant.id == held.id]
    alike = [variant for variant in manifest.variants if variant.runtime == held.runtime]
    return next(iter(named + alike), None)
