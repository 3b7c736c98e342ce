"""What jobs need at least, and what is said of a cluster that does not have it."""

from __future__ import annotations

import pytest

from instella_ray.errors import UserError
from instella_ray.operations.requirements import least
from instella_ray.resources import Group, lacking, totals

from ..kit.project import ROOT, job_config

SERVE = ["--config", str(ROOT / "configs" / "serve" / "paper.yaml")]


def needs(name: str, config: str, *settings: str) -> tuple[float, float]:
    """GPUs and CPUs of a job's command line."""
    words = [word for setting in settings for word in ("--set", setting)]
    found = totals(least(job_config(name, ["--config", str(ROOT / "configs" / config), *words])))
    return found["GPU"], found["CPU"]


@pytest.mark.parametrize(
    ("name", "config", "settings", "expected"),
    [
        ("train_generator", "generator/tiny.yaml", (), (0, 1)),
        ("train_generator", "generator/tiny.yaml", ("train.workers={count: 16, cpus: 8, gpu: true}",), (16, 128)),
        ("train_generator", "generator/tiny.yaml", ("train.workers={count: 16, min_count: 4, gpu: true}",), (4, 4)),
        ("train_tokenizer", "tokenizer/tiny.yaml", (), (0, 1)),
        ("train_tokenizer", "tokenizer/tiny.yaml", ("stages.stage2.train.workers={count: 4, gpu: true}",), (4, 4)),
        ("curate", "data/curate.yaml", ("input=a", "output=b"), (0, 1)),
        (
            "curate",
            "data/curate.yaml",
            ("input=a", "output=b", "filters.nsfw={actors: 2, gpus_per_actor: 0.5}"),
            (1, 1),
        ),
        ("recaption", "paper/02-recaption.yaml", ("input=a", "output=b"), (1, 1)),
        ("synthesize", "paper/03-synthesize.yaml", ("prompts=a", "output=b", "models.pixart_sigma.actors=8"), (8, 1)),
        ("encode", "data/encode.yaml", ("input=a", "output=b", "tokenizer=c", "actors=64"), (0, 1)),
        ("encode", "data/encode.yaml", ("input=a", "output=b", "tokenizer=c", "gpus_per_actor=1"), (1, 1)),
        ("sample", "sample/scenes.yaml", ("sample.gpus_per_actor=1", "decode={actors: 3, gpus_per_actor: 1}"), (3, 1)),
        ("evaluate", "evaluation/scenes.yaml", ("samples=a", "output=b", "gpus_per_actor=0.5"), (0.5, 1)),
        # Two generators, the text encoder and the decoder, one replica each.
        ("serve", "serve/paper.yaml", (), (3, 4)),
        ("serve", "serve/paper.yaml", ("app.models.ar.autoscaling.min_replicas=3",), (5, 6)),
        ("bench", "bench/quick.yaml", (), (0, 1)),
    ],
)
def test_the_least_that_a_job_needs(
    name: str, config: str, settings: tuple[str, ...], expected: tuple[float, float]
) -> None:
    assert needs(name, config, *settings) == expected


def test_what_a_cluster_lacks_is_said_in_one_line() -> None:
    eight = {"CPU": 96.0, "GPU": 8.0, "memory": 1e12}
    workers = (Group(16, 8, 1),)
    assert lacking(workers, [eight]) == "needs 16 GPUs and 128 CPUs, the cluster has 8 GPUs and 96 CPUs"
    assert lacking(workers, [eight, {"CPU": 64.0}]) == "needs 16 GPUs, the cluster has 8 GPUs"
    assert lacking(workers, [eight, eight]) is None
    assert lacking(workers, []) == "needs 16 GPUs and 128 CPUs, the cluster has 0 GPUs and 0 CPUs"


def test_shares_that_do_not_fit_on_the_gpus_are_said() -> None:
    """Ray would wait for room without end, although the sum of the shares is there."""
    two = [{"CPU": 9.0, "GPU": 1.0}] * 2
    assert lacking((Group(2, 1, 0.6), Group(2, 1, 0.4)), two) is None
    three = (Group(3, 1, 0.6), Group(1, 1, 0.2))
    assert lacking(three, two) == "needs at least 3 GPUs for 3 x 0.6, 1 x 0.2, the cluster has 2 GPUs"
    assert lacking(three, [*two, two[0]]) is None
    assert lacking((Group(1, 1, 0.7), Group(2, 1, 0.51)), two) == (
        "needs at least 3 GPUs for 1 x 0.7, 2 x 0.51, the cluster has 2 GPUs"
    )
    # Two of 0.4 at most on each; of exactly a half or a third there are two or three.
    assert lacking((Group(5, 1, 0.4),), two) == "needs at least 3 GPUs for 5 x 0.4, the cluster has 2 GPUs"
    assert lacking((Group(4, 1, 0.5),), two) is None and lacking((Group(6, 1, 0.3333),), two) is None


def test_a_worker_that_fits_on_no_node_is_said() -> None:
    nodes = [{"CPU": 4.0, "GPU": 1.0}, {"CPU": 4.0, "GPU": 1.0}]
    expected = "needs 1 GPU and 6 CPUs on one node, nodes of the cluster have 1 GPU and 4 CPUs"
    assert lacking((Group(1, 6, 1),), nodes) == expected
    assert lacking((Group(2, 4, 1),), nodes) is None


def test_a_job_is_read_as_it_reads_itself(capsys: pytest.CaptureFixture[str]) -> None:
    config = job_config("serve", [*SERVE, "--set", "port=8123"])
    assert type(config).__name__ == "ServeJobConfig" and config.port == 8123  # type: ignore[attr-defined]
    assert capsys.readouterr().out == ""
    with pytest.raises(UserError, match="unknown key 'prot', did you mean 'port'"):
        job_config("serve", [*SERVE, "--set", "prot=1"])
