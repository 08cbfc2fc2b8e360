"""Of the attacks that ``tests/attacks.py`` names, how many fail: each by every test that carries its name and runs by default."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree as ET

from tests import attacks
from tests.bench.result import Result

LIMIT_S = 3600.0


def run() -> Result:
    listed = {
        name: [t for t in tests if not t.slow] for name, tests in attacks.marked().items() if name in attacks.ATTACKS
    }
    wanted = sorted({test.node for tests in listed.values() for test in tests})
    with tempfile.TemporaryDirectory(prefix="skerry-bench-") as folder:
        report = Path(folder, "report.xml")
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            f"--junitxml={report}",
            "-o",
            "junit_family=xunit1",
        ]
        subprocess.run([*command, *wanted], cwd=attacks.TESTS.parent, capture_output=True, timeout=LIMIT_S, check=False)
        cases = list(ET.parse(report).iter("testcase"))
    passed, held = set(), set()
    for case in cases:
        node = f"{case.get('file')}::{str(case.get('name')).partition('[')[0]}"
        (held if any(child.tag in ("failure", "error", "skipped") for child in case) else passed).add(node)
    refused = [
        name
        for name, tests in listed.items()
        if tests and all(_plain(t.node) in passed and _plain(t.node) not in held for t in tests)
    ]
    return Result(
        bench="attacks_refused",
        value=len(refused),
        unit="attacks",
        n=len(cases),
        note=f"of {len(attacks.ATTACKS)} by name; not: {', '.join(sorted(set(attacks.ATTACKS) - set(refused))) or 'none'}",
    )


def _plain(node: str) -> str:
    """Without the class: the report names file and function."""
    file, _, rest = node.partition("::")
    return f"{file}::{rest.rpartition('::')[2]}"
