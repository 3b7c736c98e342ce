"""Google's storage, by an emulator of it on loopback: list, curate, read back, with gcsfs as on a cluster."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from instella_ray import cli, storage
from instella_ray.data.loading.image_data import ImageData

from ..kit.curation import COPY_FILTERS, shards_with_copies
from ..kit.project import ROOT


@pytest.mark.parametrize(
    "local",
    [
        pytest.param(True, marks=pytest.mark.process),
        pytest.param(False, marks=[pytest.mark.ray, pytest.mark.nightly]),
    ],
)
def test_shards_in_a_bucket_are_listed_curated_and_read_by_range(
    bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], local: bool, request: pytest.FixtureRequest
) -> None:
    shards_with_copies(tmp_path / "in")
    for path in (tmp_path / "in").glob("*.tar"):
        storage.write_bytes(f"{bucket}/in/{path.name}", path.read_bytes())
    assert cli.main(["shards", f"{bucket}/in/*.tar", "--output", f"{bucket}/in/shards.json"]) == 0
    assert "3 shards" in capsys.readouterr().out

    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    if not local:
        # A driver of its own, whose workers know where the bucket is.
        request.getfixturevalue("ray_session")
        import ray

        where = {name: os.environ[name] for name in ("STORAGE_EMULATOR_HOST", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT")}
        env["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
        env["RAY_JOB_CONFIG_JSON_ENV_VAR"] = json.dumps({"runtime_env": {"env_vars": where}})
    sets = [f"input={bucket}/in", f"output={bucket}/out", f"filters={json.dumps(COPY_FILTERS)}", "rows_per_shard=5"]
    sets.append(f"local={str(local).lower()}")
    command = [sys.executable, str(ROOT / "jobs" / "curate.py"), *(w for item in sets for w in ("--set", item))]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert storage.read_json(f"{bucket}/out/ledger.json")["kept"] == 16
    assert storage.read_text(f"{bucket}/out/curation.html").count("<figure") > 16

    data = ImageData(f"{bucket}/out", (32,), 0)
    batch = data.batch(0, np.arange(16))
    assert len(data) == 16 and batch.keys.count("0") == 2 and batch.pixels[32].std() > 10


def test_an_object_is_whole_or_absent(bucket: str) -> None:
    with pytest.raises(RuntimeError), storage.open_file(f"{bucket}/half", "wb") as stream:
        stream.write(b"half")
        raise RuntimeError("disk full")
    assert not storage.exists(f"{bucket}/half")
    for size in (0, 10, 6 << 20):
        storage.write_bytes(f"{bucket}/whole", bytes(size))
        assert storage.size(f"{bucket}/whole") == size
