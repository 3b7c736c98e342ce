"""The commands of `instella-ray`, one file each, loaded when they are run; `jobs/` runs those of a cluster as scripts."""

from __future__ import annotations

import importlib
from types import ModuleType

COMMANDS = {
    "start": {
        "demo": "run the whole pipeline on this machine, from captioned images to generated ones",
        "generate": "generate images of a prompt",
        "doctor": "check this machine, storage and configured models, and suggest fixes",
    },
    "data": {
        "shards": "write a shard list, which jobs read instead of listing a bucket",
        "icons": "build captioned images from icon and emoji sets",
        "curate": "filter and deduplicate captioned shards",
        "recaption": "describe the images of curated shards with a captioner",
        "synthesize": "generate a captioned set with pretrained text-to-image models",
        "encode": "encode curated shards as packed codes",
        "prompts": "write a file of prompts with labels, so many of each group of captioned images",
    },
    "training": {
        "plan": "predict a run's GPU-days, memory, storage, network traffic and cost",
        "train-tokenizer": "train a tokenizer, in one or several stages",
        "train-generator": "train a diffusion or autoregressive generator",
        "train-classifier": "train a classifier of labelled images, which scores generated ones",
    },
    "results": {
        "sample": "sample images in bulk",
        "evaluate": "evaluate samples or a tokenizer, and write a report",
        "compare": "compare two evaluations, with the significance of differences",
        "lineage": "print the provenance of an image, model, run or data set",
        "serve": "serve text to image over HTTP",
        "api-key": "make an API key of an endpoint, and its entry in the file of keys",
    },
    "clusters": {
        "submit": "run a job on a cluster and follow its log",
        "simulate": "simulate replicas, CPU workers and a run's bottlenecks",
        "bench": "run the benchmarks",
        "bench-gpu": "measure one GPU in at most eight minutes",
    },
    "shell": {
        "completion": "print the completion script of a shell",
    },
}
"""Group -> command -> description."""

NAMES = [name for group in COMMANDS.values() for name in group]


def load(name: str) -> ModuleType:
    """Return the module of a command, with its ``parser(prog)`` and ``main(argv, prog)``; that of a job has its ``job``."""
    return importlib.import_module(f".{name.replace('-', '_')}", __name__)
