"""A small tokenizer run that notes which samples it sees, and comes to harm where it is told to; a script as well."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch

from instella_ray.models.folders import CHECKPOINTS, STATE, checkpoint_name
from instella_ray.training.launch import launch
from instella_ray.training.tokenizer import TokenizerConfig, TokenizerTask

from .processes import wait_until
from .training import TWO, tokenizer_config


class Fragile(TokenizerTask):
    """Notes step, rank, node, process and keys of each batch in ``notes``.

    Rank 1 may kill itself in step ``kill_at``, all ranks may stand still in ``hold_at`` once a checkpoint is complete, or
    be slow (``slow_on_first``) until a node is drained; the checkpoint after step ``obstruct_at`` cannot be uploaded.
    """

    def __init__(self, cfg: TokenizerConfig, notes: str, **harm: Any) -> None:
        super().__init__(cfg)
        self.notes, self.harm, self.at = Path(notes), harm, 0
        self.rank = ray.train.get_context().get_world_rank()
        self.node = ray.get_runtime_context().get_node_id()

    def before_step(self, step: int) -> None:
        super().before_step(step)
        self.at = step

    def micro_batches(self, batch: Any, size: int, seeds: torch.Tensor) -> list[dict[str, Any]]:
        note = {"step": self.at, "rank": self.rank, "node": self.node, "pid": os.getpid(), "keys": self.keys(batch)}
        with (self.notes / f"rank{self.rank}.jsonl").open("a") as stream:
            stream.write(json.dumps(note) + "\n")
        if self.at == self.harm.get("kill_at") and self.rank == 1 and self._first("killed"):
            os.kill(os.getpid(), 9)
        if self.at == self.harm.get("hold_at") and self._first(f"held{self.rank}"):
            checkpoints = Path(self.cfg.train.run_dir, CHECKPOINTS)
            assert wait_until(lambda: any(checkpoints.glob(f"*/{STATE}")), 60)
            (self.notes / f"holding{self.rank}").touch()
            while True:
                time.sleep(0.1)
        if self.at == self.harm.get("obstruct_at") and self.rank == 0:
            # A file in the place of the next checkpoint's folder: that cannot be written, the one after it can.
            every = self.cfg.train.checkpoint_every
            Path(self.cfg.train.run_dir, CHECKPOINTS, checkpoint_name((self.at // every + 1) * every)).touch()
        if self.harm.get("slow_on_first") and self.at > 2 and not (self.notes / "drained").exists():
            time.sleep(0.2)
        return super().micro_batches(batch, size, seeds)

    def _first(self, mark: str) -> bool:
        """Whether this has not happened yet."""
        try:
            (self.notes / mark).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


def fragile_run(shards: str, run_dir: str, notes: str, train: dict[str, Any], **harm: Any) -> str:
    """Train a :class:`Fragile`; returns the final checkpoint's folder."""
    Path(notes).mkdir(parents=True, exist_ok=True)
    given = {"checkpoint_every": 4, "preview_every": 12, "loggers": (), "workers": TWO, **train}
    cfg = tokenizer_config(shards, run_dir, **given)
    return launch(cfg, lambda device: Fragile(cfg, notes, **harm), description=Path(notes).name)


def notes_of(folder: Path) -> list[dict[str, Any]]:
    """All that the ranks have noted."""
    files = sorted(folder.glob("rank*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def effective_history(folder: Path) -> dict[int, list[str]]:
    """The keys of the samples that the final weights were trained on, by step: what was redone counts once."""
    last: dict[tuple[int, int], list[str]] = {(note["step"], note["rank"]): note["keys"] for note in notes_of(folder)}
    seen: dict[int, list[str]] = {}
    for (step, _), keys in sorted(last.items()):
        seen.setdefault(step, []).extend(keys)
    return seen


def times_seen(folder: Path) -> set[int]:
    """How often samples were seen in the effective history: one number, where every epoch was whole."""
    return set(Counter(key for keys in effective_history(folder).values() for key in keys).values())


if __name__ == "__main__":
    print(fragile_run(**json.loads(sys.argv[1])))
