"""A process that has loaded what ``jobs/submit.py`` needs, and runs one command line of it after another in forks.

Each line of its input is JSON: ``argv``, ``env`` and a file for the ``output``; the exit code goes to ``output.code``.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import traceback
from pathlib import Path

import instella_ray.operations.submission  # noqa: F401

from .project import ROOT


def run(argv: list[str], output: str) -> int:
    """The exit code of ``python jobs/submit.py ARGV``, as that would end in this process."""
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = ["submit.py", *argv]
    try:
        runpy.run_path(str(ROOT / "jobs" / "submit.py"), run_name="__main__")
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    for line in sys.stdin:
        given = json.loads(line)
        if (pid := os.fork()) == 0:
            os.environ.update(given["env"])
            os.chdir(ROOT)
            code = run(given["argv"], given["output"])
            sys.stdout.flush()
            sys.stderr.flush()
            Path(given["output"] + ".part").write_text(str(code))
            os.rename(given["output"] + ".part", given["output"] + ".code")
            os._exit(0)
        print(pid, flush=True)
