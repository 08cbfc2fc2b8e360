"""Writes the golden bytes that are missing: ``python -m tests.golden.make``. It never replaces a file.

Bytes that were shipped stay as they are: when a format changes, its new bytes go into the folder of the next schema.
"""

from __future__ import annotations

from pathlib import Path

from skerry_contract import wire

from tests.golden import patches, values
from tests.golden.formats import FORMATS

FOLDER = Path(__file__).parent / "v1"


def main() -> None:
    """Writes what is missing and names it."""
    made = {name: form.write(form.value) for name, form in FORMATS.items()}
    made["batch.bin"] = wire.encode_batch(values.BATCH)
    made["record-digests.txt"] = "".join(f"{r.seq} {wire.digest(r).hex()}\n" for r in values.RECORDS).encode()
    made |= {name: patches.files(name)[2] for name in patches.SHIPPED}
    for name, data in made.items():
        path = FOLDER / name
        if not path.exists():
            path.write_bytes(data)
            print(path.name, len(data))


if __name__ == "__main__":
    main()
