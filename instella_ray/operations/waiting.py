"""Run a command once the cluster has enough resources: ``python -m instella_ray.operations.waiting NEEDS -- COMMAND``.

NEEDS is a JSON list of [processes, CPUs each, GPUs each]. An autoscaler adds nodes only for pending resource requests, but
a job fails at its start if the cluster is too small. So this module requests the resources from within the cluster first.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence

import ray
from ray.util.placement_group import placement_group, remove_placement_group

from ..errors import UserError, run_main
from ..resources import Group, Needs, amounts, totals

LOOK_S = 30.0


def queued(needs: Needs, command: Sequence[str]) -> list[str]:
    """Return the command line that waits for ``needs`` and then runs ``command``."""
    return ["python", "-m", __spec__.name, json.dumps(needs), "--", *command]


def wait_for_resources(needs: Needs) -> None:
    """Block until the cluster can provide ``needs`` at the same time."""
    claims = [{"CPU": group.cpus, "GPU": group.gpus} for group in needs for _ in range(group.processes)]
    bundles = [{name: amount for name, amount in claim.items() if amount} for claim in claims]
    ray.init(log_to_driver=False)
    group = placement_group([bundle for bundle in bundles if bundle])
    wanted = totals(needs)
    print(f"waiting for {amounts(wanted, [name for name in wanted if wanted[name]])}", flush=True)
    while not group.wait(LOOK_S):
        have = ray.cluster_resources()
        print(f"waiting, the cluster has {amounts(have, wanted)}", flush=True)
    # The autoscaler's idle timeout is longer than the command takes to claim the nodes.
    remove_placement_group(group)
    ray.shutdown()


def main(argv: Sequence[str] | None = None) -> int:
    needs, separator, *command = sys.argv[1:] if argv is None else argv
    if separator != "--" or not command:
        raise UserError("expected NEEDS -- COMMAND")
    wait_for_resources(tuple(Group(*group) for group in json.loads(needs)))
    os.execvp(command[0], command)


if __name__ == "__main__":
    sys.exit(run_main(main))
