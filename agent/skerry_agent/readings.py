"""What the device itself does: processor, memory, disk, temperature, throttling, power. Read now and then, by the supervisor.

Device readings belong to no model, and a device may serve several. They are therefore not put into every window but each into
exactly one, the next that is stored, of whatever model: ``held`` gives what was read since, ``taken`` says that it is stored.
Sums over all windows of a device are the sums of its readings. Names end in ``_sum``, ``_max`` (peaks) and ``_n`` (how many
readings are in the sum), and all numbers are integers >= 0, so that they merge exactly:

=============================== =====================================================================================
``device_cpu_permille``         share of all processors that was busy since the reading before
``device_memory_used_permille`` of memory, what is not available
``device_disk_free_kb``         free for us below the state folder, units of 1024 bytes; only ``_sum`` and ``_n``
``device_disk_used_permille``   ``_max`` alone: how full it was at the worst moment
``device_temperature_mk``       the hottest thermal zone, thousandths of a kelvin: degrees Celsius may be negative
``device_power_uw``             drawn now, microwatts: hardware monitors, else a battery that discharges
``device_energy_uj_sum``        microjoules used, by the processors' own counters (RAPL)
``device_throttle_events_n``    times that a processor's own counter saw it slow down because of heat
``device_throttled_n``          readings at which a cooling device or the firmware held the processor back
``device_battery_percent``      charge, ``device_on_battery_n`` readings without a charger
``device_readings_n``           how often anything was read
``supervisor_rss_kb``, ``supervisor_cpu_us_sum``  of the supervisor itself
``supervisor_written_kb_sum``   what it gave the disk to write, units of 1024 bytes
=============================== =====================================================================================

What a device does not tell has no name in the window. Whatever lies below ``/sys`` may vanish, hold rubbish or refuse to be
read, at any moment: that reading is left out then, the others stand.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import psutil  # type: ignore[import-untyped]  # ships no types

from skerry_agent import wear

_ZERO_CELSIUS_MK = 273_150
_HOTTEST_MC = 300_000
_MOST = 1 << 43
"""A sensor that says more is broken: no device draws 8 MW."""
_MOST_IN_ALL = (1 << 63) - 1
"""A window with a greater sum would be refused, for one sensor that is broken and all there is beside it."""
_HELD_BACK_NOW = 0xF
"""Bits of the Raspberry Pi's ``get_throttled``: under-voltage, capped, throttled, soft limit, at this moment."""


class Readings:
    """Reads the device at an interval and keeps the sums until a window takes them along.

    Args:
        folder: on the file system whose room is watched.
        interval_s: between readings; 0 for none.
        clock_s: grows only, seconds.
        sys: the root of sysfs.
    """

    def __init__(
        self, folder: Path, *, interval_s: float, clock_s: Callable[[], float], sys: Path = Path("/sys")
    ) -> None:
        self._folder = folder
        self._interval_s = interval_s
        self._clock_s = clock_s
        self._due_s = 0.0
        self._sums: dict[str, int] = {}
        self._process = psutil.Process()
        self._cpu_us = time.process_time_ns() // 1000
        self._written_kb = self._read_written_kb()
        self._cpu = _cpu_times()
        self._sensors = _Sensors(sys)
        self._energy = self._sensors.energy()
        self._throttles = self._sensors.throttle_counts()

    def tick(self) -> None:
        """Reads when it is time; cheap when it is not."""
        now_s = self._clock_s()
        if self._interval_s > 0 and now_s >= self._due_s:
            self._due_s = now_s + self._interval_s
            self.read()

    def held(self) -> dict[str, int]:
        """What was read and is in no stored window yet."""
        return self._sums

    def taken(self, held: dict[str, int]) -> None:
        """A window with ``held`` is stored."""
        if held is self._sums:
            self._sums = {}

    def read(self) -> None:
        """Takes one reading of everything."""
        before, self._cpu = self._cpu, _cpu_times()
        busy, whole = (now - then for now, then in zip(self._cpu, before, strict=True))
        if whole > 0:
            self._level("device_cpu_permille", round(1000 * min(1.0, max(0.0, busy / whole))))
        memory = psutil.virtual_memory()
        self._level("device_memory_used_permille", 1000 * (memory.total - memory.available) // max(1, memory.total))
        self._read_disk()
        self._read_sensors()
        cpu_us = time.process_time_ns() // 1000
        self._add("supervisor_cpu_us_sum", cpu_us - self._cpu_us)
        self._cpu_us = cpu_us
        written_kb = self._read_written_kb()
        if written_kb is not None and self._written_kb is not None:
            self._add("supervisor_written_kb_sum", written_kb - self._written_kb)
        self._written_kb = written_kb
        self._level("supervisor_rss_kb", self._process.memory_info().rss // 1024)
        self._add("device_readings_n", 1)

    def _read_written_kb(self) -> int | None:
        written = wear.written_bytes(self._process.pid)
        return None if written is None else written // 1024

    def _read_disk(self) -> None:
        try:
            disk = shutil.disk_usage(self._folder)
        except OSError:
            return
        self._add("device_disk_free_kb_sum", disk.free // 1024)
        self._add("device_disk_free_kb_n", 1)
        # Of what is ours to use: some of a file system is kept for root.
        self._peak("device_disk_used_permille_max", 1000 * disk.used // max(1, disk.used + disk.free))

    def _read_sensors(self) -> None:
        sensors = self._sensors
        hottest = sensors.temperature_mc()
        if hottest is not None:
            self._level("device_temperature_mk", hottest + _ZERO_CELSIUS_MK)
        power = sensors.power_uw()
        if power is not None:
            self._level("device_power_uw", power)
        used, self._energy = _grown(self._energy, sensors.energy())
        if used is not None:
            self._add("device_energy_uj_sum", used)
        counts = {name: (count, 0) for name, count in sensors.throttle_counts().items()}
        events, _ = _grown({name: (count, 0) for name, count in self._throttles.items()}, counts)
        self._throttles = {name: count for name, (count, _) in counts.items()}
        if events is not None:
            self._add("device_throttle_events_n", events)
        held_back = sensors.held_back()
        if held_back is not None:
            self._add("device_throttled_n", int(held_back))
        battery = sensors.battery()
        if battery is not None:
            percent, discharging = battery
            self._level("device_battery_percent", percent)
            self._add("device_on_battery_n", int(discharging))

    def _level(self, name: str, value: int) -> None:
        self._add(f"{name}_sum", value)
        self._add(f"{name}_n", 1)
        self._peak(f"{name}_max", value)

    def _add(self, name: str, value: int) -> None:
        self._sums[name] = min(self._sums.get(name, 0) + max(0, value), _MOST_IN_ALL)

    def _peak(self, name: str, value: int) -> None:
        self._sums[name] = min(max(self._sums.get(name, 0), value), _MOST_IN_ALL)


class _Sensors:
    """What sysfs tells. Where to look is found once: sensors of a board do not move."""

    def __init__(self, root: Path) -> None:
        kinds = root / "class"
        self._zones = sorted(kinds.glob("thermal/thermal_zone*/temp"))
        self._cooling = [
            path / "cur_state"
            for path in sorted(kinds.glob("thermal/cooling_device*"))
            if _text(path / "type").lower().startswith(("processor", "cpu", "thermal-cpufreq"))
        ]
        # Packages only: what lies below them is part of them.
        self._energy = [
            path / "energy_uj" for path in sorted(kinds.glob("powercap/intel-rapl:*")) if path.name.count(":") == 1
        ]
        self._power = sorted(kinds.glob("hwmon/hwmon*/power*_input")) or sorted(
            kinds.glob("hwmon/hwmon*/power*_average")
        )
        self._batteries = [
            path
            for path in sorted(kinds.glob("power_supply/*"))
            if _text(path / "type") == "Battery" and _text(path / "scope") != "Device"
        ]
        cpus = root / "devices/system/cpu"
        self._throttles = [
            *sorted(cpus.glob("cpu[0-9]*/thermal_throttle/core_throttle_count")),
            *sorted(cpus.glob("cpu[0-9]*/thermal_throttle/package_throttle_count"))[:1],
        ]
        self._firmware = sorted((root / "devices/platform").glob("soc*/*firmware/get_throttled"))

    def temperature_mc(self) -> int | None:
        """Of the hottest zone, thousandths of a degree Celsius."""
        found = [v for v in map(_number, self._zones) if v is not None and -_ZERO_CELSIUS_MK < v < _HOTTEST_MC]
        return max(found, default=None)

    def energy(self) -> dict[Path, tuple[int, int]]:
        """Counter of each package, and the value after which it begins again at 0."""
        found = {}
        for path in self._energy:
            value = _number(path)
            if value is not None and value >= 0:
                found[path] = value, _number(path.with_name("max_energy_range_uj")) or 0
        return found

    def throttle_counts(self) -> dict[Path, int]:
        """The processors' own counters of slowing down."""
        return {path: value for path in self._throttles if (value := _number(path)) is not None}

    def power_uw(self) -> int | None:
        """Drawn now, of what is measured; None when nothing is."""
        found = [v for v in map(_number, self._power) if v is not None and 0 <= v < _MOST]
        if not found:
            found = [v for v in map(_discharge_uw, self._batteries) if v is not None and 0 <= v < _MOST]
        return sum(found) if found else None

    def battery(self) -> tuple[int, bool] | None:
        """(charge of the emptiest battery in percent, whether one discharges)."""
        charges = [v for path in self._batteries if (v := _number(path / "capacity")) is not None and 0 <= v <= 100]
        if not charges:
            return None
        return min(charges), any(_text(path / "status") == "Discharging" for path in self._batteries)

    def held_back(self) -> bool | None:
        """Whether the processor is kept slower than it could be; None when nothing says."""
        states = [v for v in map(_number, self._cooling) if v is not None]
        bits = [v for path in self._firmware if (v := _number(path, 16)) is not None]
        if not states and not bits:
            return None
        return any(state > 0 for state in states) or any(value & _HELD_BACK_NOW for value in bits)


def _grown(
    before: dict[Path, tuple[int, int]], now: dict[Path, tuple[int, int]]
) -> tuple[int | None, dict[Path, tuple[int, int]]]:
    """By how much counters grew, those that began again included; None when none was seen twice."""
    seen = [path for path in now if path in before]
    total = 0
    for path in seen:
        step = now[path][0] - before[path][0]
        total += step if step >= 0 else max(0, step + now[path][1])
    return (min(total, _MOST) if seen else None), now


def _discharge_uw(battery: Path) -> int | None:
    if _text(battery / "status") != "Discharging":
        return None
    power = _number(battery / "power_now")
    if power is not None:
        return abs(power)
    current, voltage = _number(battery / "current_now"), _number(battery / "voltage_now")
    return None if current is None or voltage is None else abs(current) * abs(voltage) // 1_000_000


def _number(path: Path, base: int = 10) -> int | None:
    try:
        return int(_text(path), base)
    except ValueError:
        return None


def _text(path: Path) -> str:
    """Its first line; empty when it cannot be read. Past ``Path.read_text``: an unbuffered read of a small file."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return ""
    try:
        return os.read(descriptor, 256).decode("utf-8", "replace").strip().partition("\n")[0]
    except OSError:
        return ""
    finally:
        os.close(descriptor)


def _cpu_times() -> tuple[float, float]:
    """(busy, all) seconds of all processors since the device started."""
    times = psutil.cpu_times()
    idle = float(times.idle + getattr(times, "iowait", 0.0))
    # Guests' time is in user and nice already.
    busy = sum(float(getattr(times, name, 0.0)) for name in ("user", "nice", "system", "irq", "softirq", "steal"))
    return busy, busy + idle
