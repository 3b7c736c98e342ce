"""Run a command of a job once the cluster has room for it: ``python -m instella_ray.operations.waiting NEEDS -- COMMAND``.

NEEDS is a JSON list of [processes, CPUs each, GPUs each]. An autoscaler adds nodes for work that waits, and a job that
looks at the cluster first and gives up would never wait. So this asks for the room in the job's place, from within.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence

import ray
from ray.util.placement_group import placement_group, remove_placement_group

from ..errors import UserError, run_main
from .claims import Group, Needs, amounts, totals

LOOK_S = 30.0


def queued(needs: Needs, command: Sequence[str]) -> list[str]:
    """``command`` behind a wait for ``needs``, as the words of a command line."""
    return ["python", "-m", __spec__.name, json.dumps(needs), "--", *command]


def wait_for_room(needs: Needs) -> None:
    """Return once the cluster has had room for ``needs`` at the same time."""
    claims = [{"CPU": group.cpus, "GPU": group.gpus} for group in needs for _ in range(group.processes)]
    bundles = [{name: amount for name, amount in claim.items() if amount} for claim in claims]
    ray.init(log_to_driver=False)
    group = placement_group([bundle for bundle in bundles if bundle])
    wanted = totals(needs)
    print(f"waiting for {amounts(wanted, [name for name in wanted if wanted[name]])}", flush=True)
    while not group.wait(LOOK_S):
        have = ray.cluster_resources()
        print(f"waiting, the cluster has {amounts(have, wanted)}", flush=True)
    # The nodes stay for a while with nothing to do, which is longer than the command takes to claim them.
    remove_placement_group(group)
    ray.shutdown()


def main(argv: Sequence[str] | None = None) -> int:
    needs, separator, *command = sys.argv[1:] if argv is None else argv
    if separator != "--" or not command:
        raise UserError("expected NEEDS -- COMMAND")
    wait_for_room(tuple(Group(*group) for group in json.loads(needs)))
    os.execvp(command[0], command)


if __name__ == "__main__":
    sys.exit(run_main(main))
