"""Time limit of a shard: one that is never read to its end costs its rest, and nothing else."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from instella_ray.data.formats import sources
from instella_ray.data.formats.sources import read_blocks
from instella_ray.data.formats.time_limit import OutOfTimeError, within

from ...kit.shards import sample, tar_bytes


def test_items_within_the_limit_are_yielded_however_long_they_are_used() -> None:
    found = []
    for item in within(iter(range(3)), 0.2):
        time.sleep(0.1)
        found.append(item)
    assert found == [0, 1, 2] and list(within(iter("ab"), float("inf"))) == ["a", "b"]


def test_an_iterator_that_waits_forever_is_given_up() -> None:
    forever = threading.Event()

    def items() -> Iterator[int]:
        yield 1
        forever.wait()

    limited = within(items(), 0.05)
    assert next(limited) == 1
    with pytest.raises(OutOfTimeError):
        next(limited)
    forever.set()


def test_errors_pass_through_even_those_that_are_timeouts() -> None:
    def items() -> Iterator[int]:
        raise TimeoutError("of the storage")
        yield

    with pytest.raises(TimeoutError, match="of the storage"):
        next(within(items(), 60))


def test_a_shard_that_hangs_ends_with_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.tar").write_bytes(tar_bytes([member for i in range(4) for member in sample(f"{i}", i)]))
    forever, read = threading.Event(), sources.read_samples

    def hanging(*args: object) -> Iterator[dict[str, object]]:
        for number, row in enumerate(read(*args)):  # type: ignore[arg-type]
            if number == 3:
                forever.wait()
            yield row

    monkeypatch.setattr(sources, "read_samples", hanging)
    tables = list(read_blocks(str(tmp_path / "a.tar"), "a", 2, time_limit_s=0.2))
    forever.set()
    rows = [row for table in tables for row in table.to_pylist()]
    assert [(row["row"], row["problem"], row["last"]) for row in rows] == [
        (0, None, False),
        (1, None, False),
        (2, "time_limit", True),
    ]
