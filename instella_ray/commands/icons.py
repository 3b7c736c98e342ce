"""Build icons."""

from __future__ import annotations

from ..data.icons.build import IconsConfig, run_icons
from ..job import Job


def run(cfg: IconsConfig) -> None:
    print(f"{cfg.output}: {run_icons(cfg).summary()}")


ABOUT = "Build captioned images from icon and emoji sets: rendered, captioned, and split by name."
job = Job("icons", IconsConfig, run, ABOUT, resume="mode=resume")
parser, main = job.parser, job.main
