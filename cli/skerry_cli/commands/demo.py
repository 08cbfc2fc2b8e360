"""``skerry demo``: the main job on real sensor data, on this machine."""

from __future__ import annotations

from pathlib import Path
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
    """One server, sixteen devices, real data: train, approve, roll out, survive a lost network and four bad bundles."""
    try:
        from skerry_cli.demo import runner
    except ImportError as error:
        raise Usage(f"the demo needs the extra parts: pip install 'skerry[demo]' ({error.name} is missing)") from None
    if stop:
        output.say(f"{runner.stop_kept(folder)} processes were stopped.")
        return
    raise typer.Exit(runner.run_demo(folder, devices=devices, seed=seed, keep=keep))
