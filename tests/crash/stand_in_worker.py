"""A worker that serves nothing, in the few milliseconds of a bare interpreter: it says that it is ready, and goes when it is told to.

Run with ``-I -S``. Arguments: the message ``ready`` for a process 2147483647, the message ``drained``, both in hex, then what every worker gets.
"""

import os
import sys

ready, drained = map(bytes.fromhex, sys.argv[1:3])
control = int(sys.argv[sys.argv.index("--control-fd") + 1])
while message := os.read(control, 1 << 20):
    # A MessagePack map, of up to 15 entries or of more, that begins with its kind, under "t".
    at = 4 if message[0] & 0xF0 == 0x80 else 6
    kind = message[at : at + (message[at - 1] & 0x1F)]
    if kind == b"start":
        os.write(control, ready.replace(b"\x7f\xff\xff\xff", os.getpid().to_bytes(4, "big")))
    elif kind in (b"drain", b"stop"):
        os.write(control, drained)
        break
