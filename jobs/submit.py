"""`python jobs/submit.py --address http://HEAD:8265 -- jobs/train_generator.py --config FILE`: a job, on a cluster."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from instella_ray.errors import run_main
from instella_ray.operations.submission import Submission, submit


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="submit.py",
        description="Run a job on a cluster: pack the working directory, check that the cluster has what the job needs, "
        "follow the job's log and end as it does. Ctrl-C leaves the job running.",
        epilog="The token of the cluster comes from RAY_AUTH_TOKEN or ~/.ray/auth_token, with RAY_AUTH_MODE=token.",
    )
    parser.add_argument(
        "--address",
        metavar="URL",
        help="the cluster's dashboard (default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or http://127.0.0.1:8265)",
    )
    parser.add_argument("--name", help="what the job's id begins with (default: the job's name)")
    parser.add_argument("--working-dir", default=".", metavar="DIR", help="what the job runs in (default: this folder)")
    parser.add_argument("--no-follow", dest="follow", action="store_false", help="return once the job is submitted")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be packed, needed and run")
    parser.add_argument(
        "--queue", action="store_true", help="if the cluster lacks something, let the job wait there until it has grown"
    )
    parser.add_argument("command", nargs="+", metavar="-- JOB", help="as it would be run here: jobs/X.py --config FILE")
    return submit(Submission(**vars(parser.parse_args(argv))))


if __name__ == "__main__":
    sys.exit(run_main(main))
