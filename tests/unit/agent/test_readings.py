"""Readings of the device: real ones from /proc, made-up ones from a tree like /sys, and each in one window only."""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from skerry_agent import wear
from skerry_agent import workerwire as ww
from skerry_agent.clock import Clock
from skerry_agent.readings import Readings
from skerry_agent.serving.rings import Rings
from skerry_agent.store import open_store
from skerry_contract import window as w
from skerry_contract import wire


def readings(folder: Path, sys: Path, interval_s: float = 1.0) -> Readings:
    return Readings(folder, interval_s=interval_s, clock_s=time.monotonic, sys=sys)


def put(root: Path, **files: object) -> None:
    for name, value in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{value}\n")


@pytest.fixture
def sys(tmp_path: Path) -> Path:
    root = tmp_path / "sys"
    put(
        root,
        **{
            "class/thermal/thermal_zone0/temp": 41_500,
            "class/thermal/thermal_zone1/temp": 57_250,
            "class/thermal/cooling_device0/type": "Processor",
            "class/thermal/cooling_device0/cur_state": 0,
            "class/thermal/cooling_device1/type": "Fan",
            "class/thermal/cooling_device1/cur_state": 3,
            "class/powercap/intel-rapl:0/energy_uj": 1_000,
            "class/powercap/intel-rapl:0/max_energy_range_uj": 5_000,
            "class/powercap/intel-rapl:0:0/energy_uj": 900,
            "class/powercap/intel-rapl:0:0/max_energy_range_uj": 5_000,
            "class/hwmon/hwmon0/power1_input": 2_300_000,
            "class/hwmon/hwmon1/power1_input": 700_000,
            "class/power_supply/BAT0/type": "Battery",
            "class/power_supply/BAT0/status": "Discharging",
            "class/power_supply/BAT0/capacity": 63,
            "class/power_supply/BAT0/power_now": 4_000_000,
            "class/power_supply/AC/type": "Mains",
            "devices/system/cpu/cpu0/thermal_throttle/core_throttle_count": 5,
            "devices/system/cpu/cpu1/thermal_throttle/core_throttle_count": 7,
            "devices/platform/soc/soc:firmware/get_throttled": "0",
        },
    )
    return root


def test_the_real_device_says_how_busy_how_full_and_how_large_it_is(tmp_path: Path) -> None:
    reader = readings(tmp_path, Path("/sys"))
    # By the processor's clock: other programs may take turns with this one.
    end = time.process_time() + 0.3
    while time.process_time() < end:
        pass
    reader.read()
    found = reader.held()
    assert found["device_readings_n"] == found["device_cpu_permille_n"] == found["supervisor_rss_kb_n"] == 1
    # Whoever had it: one processor was busy all the while.
    assert 500 / psutil.cpu_count() < found["device_cpu_permille_sum"] <= 1000
    assert found["supervisor_cpu_us_sum"] > 290_000
    assert 0 < found["device_memory_used_permille_max"] <= 1000
    assert found["device_disk_free_kb_sum"] == pytest.approx(shutil.disk_usage(tmp_path).free / 1024, rel=0.1)
    assert found["supervisor_rss_kb_max"] == pytest.approx(psutil.Process().memory_info().rss / 1024, rel=0.1)
    assert all(isinstance(value, int) and value >= 0 for value in found.values())


def test_what_the_disk_was_given_to_write_is_counted_once(tmp_path: Path) -> None:
    if wear.written_bytes(os.getpid()) is None:
        pytest.skip("this kernel counts no writes")
    reader = readings(tmp_path, Path("/sys"))
    folder = Path(__file__).parents[3] / ".bench"
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as name:
        for _ in range(2):
            (Path(name) / "x").write_bytes(os.urandom(2_000_000))
            reader.read()
    written_kb = reader.held()["supervisor_written_kb_sum"]
    if written_kb == 0:
        pytest.skip("the checkout lies in memory")
    assert 3_900 <= written_kb < 8_000


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("rchar: 1\nwrite_bytes: 4096\ncancelled_write_bytes: 0\n", 4096),
        ("rchar: 1\n", None),
        ("write_bytes:\n", None),
        ("write_bytes: many\n", None),
        (None, None),
    ],
)
def test_a_kernel_that_counts_no_writes_tells_none(tmp_path: Path, text: str | None, wanted: int | None) -> None:
    if text is not None:
        put(tmp_path, **{"7/io": text.rstrip("\n")})
    assert wear.written_bytes(7, tmp_path) == wanted


def test_sensors_are_read_where_sysfs_has_them(tmp_path: Path, sys: Path) -> None:
    reader = readings(tmp_path, sys)
    put(sys, **{"class/powercap/intel-rapl:0/energy_uj": 4_000})
    reader.read()
    found = reader.held()
    assert found["device_temperature_mk_max"] == found["device_temperature_mk_sum"] == 57_250 + 273_150
    assert found["device_power_uw_sum"] == 3_000_000
    assert found["device_energy_uj_sum"] == 3_000  # the package, and not its core as well
    assert found["device_throttle_events_n"] == 0
    assert found["device_throttled_n"] == 0  # a fan that turns holds nothing back
    assert (found["device_battery_percent_sum"], found["device_on_battery_n"]) == (63, 1)


def test_counters_add_up_over_readings_and_over_their_own_end(tmp_path: Path, sys: Path) -> None:
    reader = readings(tmp_path, sys)
    for energy, throttled in ((4_500, 7), (200, 9), (200, 9)):
        put(
            sys,
            **{
                "class/powercap/intel-rapl:0/energy_uj": energy,
                "devices/system/cpu/cpu1/thermal_throttle/core_throttle_count": throttled,
            },
        )
        reader.read()
    found = reader.held()
    # 3,500 up to 4,500; 500 to the end of the counter and 200 beyond; nothing.
    assert found["device_energy_uj_sum"] == 3_500 + 700
    assert found["device_throttle_events_n"] == 2
    assert found["device_readings_n"] == found["device_temperature_mk_n"] == 3


@pytest.mark.parametrize(
    ("file", "value", "wanted"),
    [
        ("class/thermal/cooling_device0/cur_state", 2, 1),
        ("devices/platform/soc/soc:firmware/get_throttled", "50005", 1),
        ("devices/platform/soc/soc:firmware/get_throttled", "50000", 0),  # it was, since the start; it is not now
    ],
)
def test_a_processor_that_is_held_back_is_seen(
    tmp_path: Path, sys: Path, file: str, value: object, wanted: int
) -> None:
    put(sys, **{file: value})
    reader = readings(tmp_path, sys)
    reader.read()
    assert reader.held()["device_throttled_n"] == wanted


def test_power_comes_from_the_battery_where_nothing_measures_it(tmp_path: Path, sys: Path) -> None:
    shutil.rmtree(sys / "class/hwmon")
    reader = readings(tmp_path, sys)
    reader.read()
    (sys / "class/power_supply/BAT0/power_now").unlink()
    put(sys, **{"class/power_supply/BAT0/current_now": 500_000, "class/power_supply/BAT0/voltage_now": 12_000_000})
    reader.read()
    found = reader.held()
    assert (found["device_power_uw_sum"], found["device_power_uw_max"], found["device_power_uw_n"]) == (
        10_000_000,
        6_000_000,
        2,
    )


def test_a_frozen_board_gives_sums_that_are_not_negative(tmp_path: Path, sys: Path) -> None:
    put(sys, **{"class/thermal/thermal_zone0/temp": -30_000, "class/thermal/thermal_zone1/temp": -25_000})
    reader = readings(tmp_path, sys)
    reader.read()
    assert reader.held()["device_temperature_mk_sum"] == 248_150


def test_sensors_that_vanish_or_talk_rubbish_are_left_out_and_the_rest_stands(tmp_path: Path, sys: Path) -> None:
    reader = readings(tmp_path, sys)
    put(
        sys,
        **{
            "class/thermal/thermal_zone0/temp": "nan",
            "class/thermal/thermal_zone1/temp": 9_999_999_999,
            "class/hwmon/hwmon0/power1_input": "",
            "class/powercap/intel-rapl:0/energy_uj": "-",
        },
    )
    shutil.rmtree(sys / "class/power_supply")
    reader.read()
    found = reader.held()
    assert "device_temperature_mk_n" not in found
    assert "device_energy_uj_sum" not in found
    assert "device_battery_percent_n" not in found
    assert found["device_power_uw_sum"] == 700_000
    assert found["device_readings_n"] == 1


def test_nothing_is_read_before_it_is_time_or_without_an_interval(tmp_path: Path) -> None:
    times_s = [0.0, 0.5, 29.5, 30.0, 31.0]
    reader = Readings(tmp_path, interval_s=30.0, clock_s=iter(times_s).__next__)
    never = Readings(tmp_path, interval_s=0.0, clock_s=iter(times_s).__next__)
    for _ in times_s:
        reader.tick()
        never.tick()
    assert reader.held()["device_readings_n"] == 2
    assert never.held() == {}


# --- into one window only --------------------------------------------------------------------------------------------


@dataclass
class Heard:
    """In the place of a worker's channel."""

    sent: list[object] = field(default_factory=list)

    def send(self, message: object) -> None:
        self.sent.append(message)


def cut(model: str, upto: int) -> ww.WindowCut:
    at = w.Instant("b" * 32, 1, 2, True)
    key = w.Key(model, "a" * 64, "v", "none", "", 0)
    found = w.Window(key=key, start=at, end=at, counts=w.Counts(ok=1), resources={"worker_rss_n": 1})
    return ww.WindowCut(
        ring=f"/nowhere/1-{model}-0.ring", start=upto - 1, upto=upto, body=wire.encode(found), inferences=1
    )


def test_each_reading_goes_along_with_one_window_whatever_the_models(tmp_path: Path) -> None:
    numbers = itertools.count(1)
    store, _ = open_store(
        tmp_path / "state.db",
        binding="m",
        device="d-1",
        new_epoch=lambda: f"{next(numbers):032x}",
        wall_s=1.0,
        bound_bytes=1 << 24,
    )
    try:
        reader = readings(tmp_path, tmp_path / "no-sys")
        rings = Rings(
            tmp_path / "rings", store, Clock(), on_records=lambda: None, on_fault=lambda error: None, readings=reader
        )
        worker = Heard()
        made = 0
        for upto in range(1, 6):
            for model in ("gas", "wear"):
                if (upto + len(model)) % 3:
                    reader.read()
                    made += 1
                rings.commit(worker, cut(model, upto))  # type: ignore[arg-type]
        # Sent twice: the window is known, so its copy must take no readings along.
        reader.read()
        rings.commit(worker, cut("gas", 1))  # type: ignore[arg-type]
        batch = store.next_batch(set(), max_bytes=1 << 20, max_records=100)
        assert batch is not None
        stored = [wire.decode_window(record.body) for record in batch.records]
        assert len(stored) == 10
        assert sum(window.resources.get("device_readings_n", 0) for window in stored) == made
        assert sum(window.resources["worker_rss_n"] for window in stored) == 10
        assert reader.held()["device_readings_n"] == 1
    finally:
        store.close()
