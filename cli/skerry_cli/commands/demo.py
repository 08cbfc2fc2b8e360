"""``skerry demo``: the main job on real sensor data, on this machine."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from skerry_cli import output
from skerry_cli.errors import Usage


def demo(
    folder: Annotated[Path, typer.Option("--dir", help="Folder of the demo; emptied first.")] = Path("demo"),
    devices: Annotated[int, typer.Option("--devices", help="How many agents.")] = 16,
    seed: Annotated[int, typer.Option("--seed", help="Of the rows that the applications draw.")] = 1,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the fleet running at the end.")] = False,
    stop: Annotated[bool, typer.Option("--stop", help="Stop a fleet that was kept.")] = False,
) -> None:
    """One server, sixteen devices, real data: drift, late labels, a good and a bad rollout judged, a lost network, four bad bundles."""
    with _interruptible():
        try:
            from skerry_cli.demo import runner
        except ImportError as error:
            why = f"{error.name} is missing" if error.name else str(error)
            raise Usage(f"the demo needs the extra parts: pip install 'skerry[demo]' ({why})") from None
    if stop:
        output.say(f"{runner.stop_kept(folder)} processes were stopped.")
        return
    raise typer.Exit(runner.run_demo(folder, devices=devices, seed=seed, keep=keep))


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C while heavy libraries are imported ends as Ctrl-C: one that comes in the middle of C code may arrive as any error."""
    interrupted = False

    def note(_number: int, _frame: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = True
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield
    except Exception:
        if interrupted:
            raise KeyboardInterrupt from None
        raise
    finally:
        signal.signal(signal.SIGINT, previous)
    if interrupted:
        raise KeyboardInterrupt
