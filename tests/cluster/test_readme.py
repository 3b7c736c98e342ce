"""``cluster/README.md``: its figures are those that its own commands print, and it names what is there."""

from __future__ import annotations

import json
import re
import shlex

import pytest

from instella_ray import cli

from ..shell_lines import shell_lines
from ..test_repository import ROOT
from .overlays import FOLDER, objects

README = (ROOT / "cluster" / "README.md").read_text()
PLANS = [shlex.split(line)[1:] for line in shell_lines(README) if line.startswith("instella-ray plan")]


def rows(title: str) -> dict[str, list[str]]:
    """The rows of the table whose first heading starts with ``title``."""
    table = re.search(rf"^\| {title}.*\n(?:\|.*\n)+", README, re.M)
    assert table, title
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table[0].splitlines()]
    return {first: rest for first, *rest in cells}


def test_the_figures_are_what_the_commands_print(capsys: pytest.CaptureFixture[str]) -> None:
    plans = []
    for arguments in PLANS:
        assert cli.main([*arguments, "--json"]) == 0
        plans.append(json.loads(capsys.readouterr().out))
    *generators, tokenizer = plans
    told = rows("the paper's diffusion generator")
    for column, plan in enumerate([plan.get("", plan) for plan in generators]):
        step = 4096 / plan["gpus"] / plan["images_per_second"]
        sent = plan["network"]["sent_per_step"]
        for row, value in {
            "GPU-days": plan["gpu_days"],
            "days": plan["gpu_days"] / plan["gpus"],
            "memory a GPU, GB (micro-batch)": plan["memory_total"] / 1e9,
            "computing a step of 4,096, s": step,
            "a GPU sends each step, GB": sent / 1e9,
            "the same at 50 GB/s a GPU, s": sent / 50e9,
            "all read, MB/s": plan["network"]["read_per_second"] / 1e6,
        }.items():
            assert float(told[row][column].split()[0]) == pytest.approx(value, rel=0.02, abs=0.05), (row, column)
        assert plan["fits"]
    told = rows("the paper's tokenizer")
    for column, stage in enumerate(tokenizer.values()):
        assert float(told["days"][column]) == pytest.approx(stage["gpu_days"] / 8, abs=0.05)
        assert float(told["memory a GPU, GB"][column]) == pytest.approx(stage["memory_total"] / 1e9, abs=0.05)
        assert float(told["all read, MB/s"][column]) == pytest.approx(
            stage["network"]["read_per_second"] / 1e6, abs=0.5
        )


def test_files_secrets_and_components_that_it_names_exist() -> None:
    for name in re.findall(r"`((?:kuberay|vm|docker|components)/[\w./{},-]+)`", README):
        head, _, options = name.partition("{")
        names = [head + option for option in options.rstrip("}").split(",")] if options else [head]
        for path in names:
            assert (ROOT / "cluster" / path).exists() or (FOLDER / path).exists(), path
    built = json.dumps(objects("mi300x"))
    for secret in re.findall(r"create secret generic (\S+)", README):
        assert f'"{secret}"' in built
    assert {path.name for path in (FOLDER / "components").iterdir()} <= set(re.findall(r"[a-z-]+", README))
    assert "## Sizes by simulation" in README.splitlines()
