"""The command line: one list of commands, each explains itself, and `generate` from a prompt to a file."""

from __future__ import annotations

import io
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from instella_ray import __version__, cli
from instella_ray.commands import NAMES
from instella_ray.config import recipes
from instella_ray.data.formats.images import read_metadata
from instella_ray.models.checkpoint import add_section
from instella_ray.sheet import MARGIN, TILE

from .kit.models import make_generator, make_tokenizer
from .kit.project import JOBS, PACKAGE, ROOT


def test_help_lists_every_command_in_one_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == cli.main([]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {name:<16} " in out for name in NAMES) and max(map(len, out.splitlines())) <= 100
    files = {path.stem.replace("_", "-") for path in (PACKAGE / "commands").glob("*.py")} - {"--init--"}
    assert files == set(NAMES) and {path.stem.replace("_", "-") for path in JOBS} < files


@pytest.mark.parametrize("name", NAMES)
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main([name, "--help"])
    assert f"usage: instella-ray {name}" in capsys.readouterr().out


def test_version_and_unknown_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0 and capsys.readouterr().out == f"instella-ray {__version__}\n"
    assert cli.main(["train-generatr"]) == 2
    assert "unknown command 'train-generatr', did you mean 'train-generator'?" in capsys.readouterr().err
    assert cli.main(["xyz"]) == 2 and "unknown command 'xyz'; expected one of demo, " in capsys.readouterr().err


@pytest.mark.process
def test_help_loads_nothing_heavy() -> None:
    code = "import sys; from instella_ray.cli import main; main(['--help']); sys.exit('pydantic' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def completion(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The completion script of a shell, in a file."""
    folder = tmp_path_factory.mktemp("completion")

    def write(shell: str) -> Path:
        out = io.StringIO()
        with redirect_stdout(out):
            assert cli.main(["completion", shell]) == 0
        (folder / shell).write_text(out.getvalue())
        return folder / shell

    return write


@pytest.mark.process
def test_bash_completes_commands_flags_recipes_and_files(completion: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "data.yaml").touch()
    lines = {
        "instella-ray train": {"train-tokenizer", "train-generator", "train-classifier"},
        "instella-ray curate --co": {"--config"},
        "instella-ray curate --config dat": {*(n for n in recipes() if n.startswith("data/")), "data.yaml"},
        "instella-ray sample --dec": {"--decode"},
        "instella-ray completion f": {"fish"},
    }
    code = f"source {completion('bash')}; for line in {' '.join(map(shlex.quote, lines))}; do COMP_WORDS=($line); "
    code += "COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); COMPREPLY=(); _shtab_instella_ray 2>/dev/null; "
    code += 'echo "${COMPREPLY[*]}"; done'
    out = subprocess.run(["bash", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert [set(line.split()) for line in out.splitlines()] == list(lines.values())


@pytest.mark.process
@pytest.mark.parametrize(("shell", "check"), [("zsh", "zsh -n"), ("fish", "fish --no-execute")])
def test_other_shells_can_read_theirs(shell: str, check: str, completion: Callable[[str], Path]) -> None:
    if not shutil.which(shell):
        pytest.skip(f"no {shell} here")
    subprocess.run([*check.split(), str(completion(shell))], check=True)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Folders of a random generator and its tokenizer."""
    root = tmp_path_factory.mktemp("models")
    tokenizer_hash = make_tokenizer(root / "bit")
    generator = make_generator(root / "ar", tokenizer_hash, "ar")
    add_section(generator, "card", {"sampling": {"guidance_scale": 2.0, "temperature": 0.5}})
    return generator, str(root / "bit")


def generate(models: tuple[str, str], output: Path, *more: str) -> int:
    model, tokenizer = models
    options = ["--model", model, "--tokenizer", tokenizer, "--device", "cpu", "-o", str(output)]
    return cli.main(["generate", "a red circle", *options, *more])


def test_generate_writes_files_that_say_what_made_them(
    models: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(models, tmp_path / "out.png", "-n", "2", "--seed", "7", "--size", "32x48") == 0
    assert capsys.readouterr().out.splitlines()[1] == f"{tmp_path / 'out-1.png'}: 32x48, seed 8"
    data = (tmp_path / "out-1.png").read_bytes()
    assert Image.open(tmp_path / "out-1.png").size == (32, 48)
    about = read_metadata(data)
    assert about is not None and about["prompt"] == "a red circle" and about["seed"] == 8
    assert (about["guidance_scale"], about["temperature"], about["size"]) == (2.0, 0.5, [32, 48])
    assert generate(models, tmp_path / "again.png", "--seed", "8", "--size", "32x48") == 0
    assert (tmp_path / "again.png").read_bytes() == data
    assert generate(models, tmp_path / "other.png", "--seed", "8", "--temperature", "0") == 0
    about = read_metadata((tmp_path / "other.png").read_bytes())
    assert about is not None and (about["guidance_scale"], about["temperature"]) == (2.0, 0.0)


def test_generate_draws_many_prompts_into_files_or_on_one_sheet(
    models: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "more.txt").write_text("a blue cross\n\n")
    asked = ("--prompts", str(tmp_path / "more.txt"), "-n", "2", "--seed", "3", "--size", "32x32")
    assert generate(models, tmp_path / "out.png", *asked) == 0
    files = [tmp_path / f"out-{number}.png" for number in range(4)]
    abouts = [read_metadata(file.read_bytes()) for file in files]
    found = [(about["prompt"], about["seed"]) for about in abouts if about is not None]
    assert found == [("a red circle", 3), ("a red circle", 4), ("a blue cross", 5), ("a blue cross", 6)]
    assert generate(models, tmp_path / "sheet.png", *asked, "--sheet", "2") == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{tmp_path / 'sheet.png'}: 4 images, seeds 3 to 6"
    sheet, first = (np.asarray(Image.open(file)) for file in (tmp_path / "sheet.png", files[0]))
    assert np.array_equal(sheet[MARGIN:][:TILE:4, MARGIN:][:, :TILE:4], first)


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("out.gif", (), "out.gif: expected a name that ends with .jpg, .png, .jpeg, .webp"),
        ("none/out.png", (), "none/out.png: no folder"),
        ("there.png", (), "there.png: already exists"),
        ("folder.png", (), "folder.png: a folder, expected the name of a file"),
        ("out.png", ("--size", "32"), "--size 32: expected WIDTHxHEIGHT"),
        ("out.png", ("--size", "33x32"), "height 32, width 33: expected multiples of 8"),
        ("out.png", ("-n", "0"), "--count 0: expected at least 1"),
        ("out.png", ("--sheet", "0"), "--sheet 0: expected at least 1 image a row"),
    ],
)
def test_generate_refuses_what_it_cannot_do(
    models: tuple[str, str],
    tmp_path: Path,
    name: str,
    more: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "there.png").touch()
    (tmp_path / "folder.png").mkdir()
    assert generate(models, tmp_path / name, *more) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        ["shards", "x.tar", "--output"],
        ["simulate", "simulation/mi300x", "--output"],
        ["bench", "--set", "suites=[data]", "--set"],
        ["bench-gpu", "--tiny", "--output"],
    ],
    ids=lambda command: command[0],
)
def test_a_folder_is_no_file_to_write(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Said before the work, which takes minutes."""
    target = tmp_path / "folder.json"
    target.mkdir()
    given = f"output={target}" if command[-1] == "--set" else str(target)
    assert cli.main([*command, given]) == 2
    assert f"{target}: a folder, expected the name of a file" in capsys.readouterr().err
    assert list(tmp_path.rglob("*")) == [target]
