"""Every shell line that a README or a page of the documentation shows could be typed: its files, flags and keys exist."""

from __future__ import annotations

from pathlib import Path

import pytest

from instella_ray.errors import UserError

from .kit.project import ROOT
from .kit.shell_lines import check_line, commands, shell_lines

READMES = [ROOT / "README.md", ROOT / "cluster" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINES = {path: list(shell_lines(path.read_text())) for path in READMES}


def test_shell_lines_are_found() -> None:
    assert LINES[ROOT / "README.md"] and len(LINES[ROOT / "cluster" / "README.md"]) > 10
    assert sum(map(len, LINES.values())) > 60


@pytest.mark.parametrize(
    "path", [path for path in READMES if LINES[path]], ids=lambda path: str(path.relative_to(ROOT))
)
def test_shell_lines_of_the_readmes_could_be_typed(path: Path) -> None:
    for line in LINES[path]:
        try:
            check_line(line)
        except (AssertionError, UserError, SystemExit, ValueError) as error:
            pytest.fail(f"{line}\n{error}")


@pytest.mark.parametrize(
    "line",
    [
        "python jobs/curat.py --config configs/data/curate.yaml",
        "python jobs/curate.py --config configs/data/curated.yaml --set input=a --set output=b",
        "python jobs/curate.py --config configs/data/curate.yaml --set input=a --set outputs=b",
        "python jobs/curate.py --confg configs/data/curate.yaml",
        "ray job submit -- python jobs/encode.py --config configs/data/encode.yaml --set input=a",
        "python jobs/submit.py --adress http://127.0.0.1:8265 -- jobs/curate.py --set input=a --set output=b",
        "python jobs/submit.py --address http://127.0.0.1:8265 -- jobs/curate.py --set input=a",
        "python jobs/submit.py --address http://127.0.0.1:8265 -- jobs/curate.py --set input=gs://b/a --set output=curated",
        "instella-ray submit --address http://127.0.0.1:8265 -- curate --set input=shards --set output=gs://b/curated",
        "ray job submit -- python jobs/train_tokenizer.py --config configs/paper/05-tokenizer.yaml --set data=gs://b/a",
        "instella-ray plann configs/paper/08-diffusion.yaml",
        "instella-ray plan configs/paper/08-diffusion.yaml --gpu-days 3 --frm-images",
        "instella-ray plan configs/paper/08-difusion.yaml",
        "make demmo",
        "kubectl apply -k cluster/kuberay/overlays/mi300",
        "docker build --file cluster/docker/Dockerfile.roc .",
        "ray up cluster/vm/aws.yaml",
        "make test && mkae demo",
        "echo 'open",
    ],
)
def test_a_slip_in_a_line_is_found(line: str) -> None:
    with pytest.raises((AssertionError, UserError, SystemExit, ValueError)):
        check_line(line)


def test_lines_come_apart_into_commands() -> None:
    text = "x\n```sh\n# a remark\nmake test  # all\nA=1 curl -s 'a|b' \\\n  -d x | sed s/a/b/ > out.txt\n```\n"
    text += "```yaml\na: b\n```\n"
    assert [words for line in shell_lines(text) for words in commands(line)] == [
        ["make", "test"],
        ["curl", "-s", "a|b", "-d", "x"],
        ["sed", "s/a/b/"],
    ]
