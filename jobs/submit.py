"""Submit a job: `python jobs/submit.py --address http://HEAD:8265 -- jobs/train_generator.py --config FILE`."""

from __future__ import annotations

import sys

from instella_ray.commands.submit import main
from instella_ray.errors import run_main

if __name__ == "__main__":
    sys.exit(run_main(main))
