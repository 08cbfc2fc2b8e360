"""Runs the demo from an empty folder to its summary, and leaves nothing behind.

Whatever happens (the end, an invariant that does not hold, Ctrl-C, an error), every process that was started is ended with its
group. A run that was killed so hard that this could not happen is cleaned up by the next one. A run that is interrupted also
removes its folder; after any other end the logs and the summary stay. One run at a time has the folder, by a lock that the
kernel frees with its process.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import fcntl
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from skerry_cli import output
from skerry_cli.demo import act_hostile, act_rollback, act_rollouts, act_start, reckoning
from skerry_cli.demo.fleet import Fleet
from skerry_cli.demo.processes import RECORD, Processes, stop_recorded
from skerry_cli.demo.run import Run
from skerry_cli.demo.screen import Screen
from skerry_cli.errors import CliError, Failed, Usage

MARK = ".skerry-demo"
LEAST_DEVICES = 16
"""With fewer, four candidates can fall in too few ways for the judge to compare them with the others."""


def run_demo(folder: Path, *, devices: int, seed: int, keep: bool) -> int:
    """Runs the demo; returns the exit code: 0 when every invariant held.

    Args:
        folder: emptied first when an earlier run made it; refused when it holds anything else.
        devices: how many agents.
        seed: of the rows that the applications draw.
        keep: leave server, agents and applications running at the end.

    Raises:
        Usage: too few devices, a folder that is not the demo's, or another demo that runs in it.
        KeyboardInterrupt: Ctrl-C, SIGTERM or SIGHUP; everything is ended and the folder removed by then.
    """
    if devices < LEAST_DEVICES:
        raise Usage(f"--devices {devices}: wanted at least {LEAST_DEVICES}")
    folder = folder.resolve()
    # A closed terminal and a service manager end the demo as Ctrl-C does: in order.
    previous = {number: signal.signal(number, _interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        with _claimed(folder):
            try:
                _empty(folder)
                return _run(folder, devices=devices, seed=seed, keep=keep)
            except KeyboardInterrupt:
                shutil.rmtree(folder)
                output.note(f"skerry: interrupted; every process of the demo is ended and {folder} is removed")
                raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _run(folder: Path, *, devices: int, seed: int, keep: bool) -> int:
    screen = Screen()
    screen.say(f"Everything is in {folder}; nothing leaves this machine.")
    processes = Processes(folder, leashed=not keep)
    fleet = Fleet(folder, processes, seed=seed)
    run = Run(fleet=fleet, screen=screen, now=lambda: dt.datetime.now(dt.UTC))
    kept = False
    try:
        act_start.start(run, devices=devices)
        act_rollouts.first_model(run)
        act_rollouts.world_moves(run)
        act_rollouts.lose_network(run)
        act_rollouts.second_model(run)
        act_rollouts.regain_network(run)
        act_rollback.third_model(run)
        act_hostile.hostile(run)
        summary = reckoning.reckon(run)
        path = reckoning.write(summary, folder)
        reckoning.show(run, summary)
        if keep:
            _leave_running(run)
            kept = True
        screen.say(f"Summary: {path}")
        if summary["broken"]:
            raise Failed(f"{len(summary['broken'])} invariants do not hold: {'; '.join(summary['broken'])}")
        screen.say("Every invariant held.", style="bold green")
        return 0
    except CliError as error:
        raise type(error)(error.message, advice=error.advice or f"logs: {folder / 'logs'}") from error
    except KeyboardInterrupt:
        screen.settle()
        output.note("skerry: interrupted; ending the server, the agents and their applications, up to 10 s")
        raise
    finally:
        screen.settle()
        if not kept:
            # A second Ctrl-C must not stop the clean-up half way.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            processes.stop()
            (folder / RECORD).unlink(missing_ok=True)
            signal.signal(signal.SIGINT, signal.default_int_handler)


def stop_kept(folder: Path) -> int:
    """Ends a fleet that was kept (or that a killed run left); returns how many processes were ended.

    Raises:
        Usage: a demo runs in the folder: it is stopped where it runs.
    """
    folder = folder.resolve()
    if not (folder / MARK).exists():
        return 0
    with _claimed(folder):
        return len(stop_recorded(folder))


@contextlib.contextmanager
def _claimed(folder: Path) -> Iterator[None]:
    """Makes the folder and has it alone. Raises ``Usage`` when it is somebody else's, or another run has it."""
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / MARK).exists())):
        raise Usage(f"{folder}: exists and is not a demo's folder; name another with --dir")
    folder.mkdir(parents=True, mode=0o700, exist_ok=True)
    descriptor = os.open(folder / MARK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.read(descriptor, 20).decode(errors="replace").strip()
            raise Usage(
                f"{folder}: a demo runs here (pid {pid or 'not known'})",
                advice="stop it with Ctrl-C where it runs, or name another folder with --dir",
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _empty(folder: Path) -> None:
    stop_recorded(folder)
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != MARK:
            entry.unlink()
    # The folder holds throwaway private keys: it is never committed, whatever the repository around it ignores.
    (folder / ".gitignore").write_text("*\n", encoding="utf-8")


def _leave_running(run: Run) -> None:
    fleet, screen = run.fleet, run.screen
    for device in fleet.devices:
        fleet.start_application(device)
    screen.heading("The fleet is kept")
    screen.say(
        f"API: {fleet.server.url} (CA {fleet.server.data / 'ca' / 'ca.pem'}, token {fleet.server.data / 'admin.token'})"
    )
    screen.say(
        f"Ask it: skerry --server {fleet.server.url} --ca {fleet.server.data / 'ca' / 'ca.pem'} "
        f"--token {fleet.server.data / 'admin.token'} --keys {fleet.ceremony.directory} device list"
    )
    for device in fleet.devices:
        where = fleet.status_address(device)
        screen.say(f"{device}: http://{where}/v2/models/gas")
    stop = [sys.executable, "-m", "skerry_cli", "demo", "--stop", "--dir", str(fleet.folder)]
    screen.say(f"Stop it: {shlex.join(stop)}")


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
