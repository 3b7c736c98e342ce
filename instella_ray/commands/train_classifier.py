"""Train a classifier of labelled images."""

from __future__ import annotations

from ..job import Job
from ..rendering import table
from ..training.classifier import ClassifierRunConfig, accuracy_rows, run_classifier


def run(cfg: ClassifierRunConfig) -> None:
    print(table(accuracy_rows(run_classifier(cfg))))
    print(f"classifier: {cfg.output}")


ABOUT = "Train a classifier of labelled images, which scores generated ones, on this machine's CPU in minutes."
job = Job("train-classifier", ClassifierRunConfig, run, ABOUT)
parser, main = job.parser, job.main
