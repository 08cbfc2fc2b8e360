"""A worker for tests: the real channel and no models. The file ``act`` in its folder says how it behaves when it is started.

``ready`` (or no file): says ready and does what it is told. ``wait``: says ready once the file ``go`` is there. ``die``: says ready and dies.
``lacks NAME``: has no runtime for that model, and ends.
On ``flush`` it sends a window of three inferences. What it hears is appended to ``heard``, one line per message: generation, kind, arm.
"""

import asyncio
import os
import socket
import sys
from pathlib import Path

from skerry_agent import workerwire as ww
from skerry_agent.channel import Channel
from skerry_contract import window as w
from skerry_contract import wire

folder = Path(sys.argv[1])
AT = w.Instant("b" * 32, 1, 2, True)


class Worker:
    def __init__(self) -> None:
        self.over = asyncio.Event()
        self.start = ww.Start(generation=0, models=())
        self.upto = 0
        control = socket.socket(fileno=int(sys.argv[sys.argv.index("--control-fd") + 1]))
        self.channel = Channel(control, self.take, self.over.set)

    def take(self, message: ww.ToWorker, fd: int | None) -> None:
        if isinstance(message, ww.Start):
            self.start = message
        with (folder / "heard").open("a") as file:
            file.write(f"{self.start.generation} {message.__struct_config__.tag} {getattr(message, 'arm', '')}\n")
        match message:
            case ww.Start():
                self.begin((folder / "act").read_text() if (folder / "act").exists() else "ready")
            case ww.Flush(id=number):
                self.cut()
                self.channel.send(ww.Flushed(id=number))
            case ww.Drain() | ww.Stop():
                self.channel.send(ww.Drained())
                self.over.set()

    def begin(self, act: str) -> None:
        if act == "wait" and not (folder / "go").exists():
            asyncio.get_running_loop().call_later(0.01, self.begin, act)
            return
        lacks, _, name = act.partition(" ")
        if lacks == "lacks" and name in {served.name for served in self.start.models}:
            self.channel.send(ww.Failed(model=name, code="runtime_missing", detail="as told"))
            self.over.set()
            return
        self.channel.send(ww.Ready(pid=os.getpid(), models=()))
        if act == "die":
            os._exit(3)

    def cut(self) -> None:
        served = self.start.models[0]
        key = w.Key(served.name, served.digest, served.variant, served.arm, served.rollout, served.stage)
        body = wire.encode(w.Window(key=key, start=AT, end=AT, counts=w.Counts(ok=3)))
        self.channel.send(ww.WindowCut(ring=served.ring, start=self.upto, upto=self.upto + 3, body=body, inferences=3))
        self.upto += 3


async def main() -> None:
    worker = Worker()
    await worker.over.wait()
    await worker.channel.flushed()


asyncio.run(main())
