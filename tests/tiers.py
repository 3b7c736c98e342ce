"""`python -m tests.tiers fast|default|all [pytest's arguments]`: the tiers of the tests, part by part, with one summary.

A part that fails keeps no other from running. A test of the default tier may take `test_budget_s` seconds
(pyproject.toml); one that takes longer and is not marked `nightly` fails the run.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
SLOWEST = 15
SPREAD = ("-n", "logical", "--dist", "loadfile")
"""A process for every core; each takes whole files, whose tests share fixtures."""
PARTS = {
    "units": ("unit and not nightly", SPREAD),
    "without Ray": ("(unit or process) and not nightly", SPREAD),
    "on Ray": ("not unit and not process and not nightly", ()),
    "nightly": ("nightly", ()),
}
TIERS = {"fast": ("units",), "default": ("without Ray", "on Ray"), "all": ("without Ray", "on Ray", "nightly")}
NO_TESTS = 5
"""Pytest's exit code where a part has none of the tests that were asked for."""


class Outcome(NamedTuple):
    """One test as a part has reported it."""

    name: str
    kind: str
    """``passed``, ``failed`` or ``skipped``."""
    seconds: float
    part: str


def main(argv: Sequence[str]) -> int:
    if not argv or argv[0] not in TIERS:
        print(f"expected one of {', '.join(TIERS)}, then pytest's own arguments", file=sys.stderr)
        return 2
    tier, *arguments = argv
    outcomes: list[Outcome] = []
    broken: list[str] = []
    took: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for part in TIERS[tier]:
            report, began = Path(folder, f"{part}.xml"), time.monotonic()
            print(f"--- {part}", flush=True)
            code = run_part(part, report, arguments)
            took[part] = time.monotonic() - began
            outcomes += read_report(report, part) if report.exists() else []
            # A part may fail without a failed test: by an error at collection, or by its process's end.
            if code not in (0, 1, NO_TESTS):
                broken.append(f"{part}: pytest ended with {code}")
    return summarise(outcomes, broken, took, budget_s())


def run_part(part: str, report: Path, arguments: Sequence[str]) -> int:
    """Pytest's exit code for a part, whose outcomes it writes into ``report``."""
    markers, spread = PARTS[part]
    command = [sys.executable, "-m", "pytest", "-m", markers, *spread, f"--junitxml={report}", *arguments]
    return subprocess.run(command, cwd=ROOT).returncode


def read_report(report: Path, part: str) -> list[Outcome]:
    """The tests in a JUnit file; one that failed and whose end failed too counts once."""
    found: dict[str, Outcome] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        tags = {child.tag for child in case}
        kind = "failed" if tags & {"failure", "error"} else "skipped" if "skipped" in tags else "passed"
        before = found.get(name)
        if before is not None and before.kind == "failed":
            kind = "failed"
        found[name] = Outcome(name, kind, float(case.get("time", 0)), part)
    return list(found.values())


def budget_s() -> float:
    """Seconds that a test of the default tier may take: those of the configuration, and more on a slower machine."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["instella_ray"]
    seconds = []
    for _ in range(2):  # the first may wait for the disk
        began = time.monotonic()
        subprocess.run([sys.executable, "-c", "import torch"], check=True)
        seconds.append(time.monotonic() - began)
    return float(settings["test_budget_s"]) * max(1.0, min(seconds) / float(settings["test_budget_import_s"]))


def summarise(outcomes: Sequence[Outcome], broken: Sequence[str], took: dict[str, float], budget: float) -> int:
    """Print what became of all parts; returns the exit code."""
    print(f"\n=== the {SLOWEST} slowest of {len(outcomes)} tests")
    for each in sorted(outcomes, key=lambda outcome: -outcome.seconds)[:SLOWEST]:
        print(f"{each.seconds:7.1f} s  {each.name}")
    over = [each for each in outcomes if each.seconds > budget and each.part != "nightly"]
    for each in over:
        print(f"over budget: {each.name} took {each.seconds:.0f} s, {budget:g} are allowed without the marker nightly")
    for each in outcomes:
        if each.kind == "failed":
            print(f"FAILED {each.name} ({each.part})")
    for line in broken:
        print(f"FAILED {line}")
    print(", ".join(f"{part}: {seconds:.0f} s" for part, seconds in took.items()))
    counts = Counter(each.kind for each in outcomes)
    print(f"{counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped")
    return int(bool(counts["failed"] or broken or over or not counts["passed"]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
