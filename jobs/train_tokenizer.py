"""Train a tokenizer: `python jobs/train_tokenizer.py --config configs/tokenizer/demo.yaml --set train.run_dir=DIR`."""

from __future__ import annotations

import sys

from instella_ray.commands.train_tokenizer import job
from instella_ray.errors import run_main

if __name__ == "__main__":
    sys.exit(run_main(job.main))
