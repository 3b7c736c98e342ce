"""Configuration: a wrong key or value is one line that names the file, the key and what was expected."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from pydantic import Field

from instella_ray import cli
from instella_ray.config import Config, describe, dump_yaml, load_config, plain_text, read_yaml, recipes
from instella_ray.errors import UserError, run_main

ROOT = Path(__file__).parents[1]


class Inner(Config):
    width: int = Field(8, ge=1)
    """Hidden width."""


class Outer(Config):
    name: str
    """A name."""
    inner: Inner = Inner()


class Named(Config):
    by_name: dict[str, Inner]
    in_order: tuple[Inner, ...]


def write(tmp_path: Path, text: str) -> str:
    (tmp_path / "c.yaml").write_text(text)
    return str(tmp_path / "c.yaml")


def test_files_and_overrides_meet(tmp_path: Path) -> None:
    path = write(tmp_path, "name: a\ninner: {width: 3}\n")
    assert load_config(Outer, path).inner.width == 3
    cfg = load_config(Outer, path, ["inner.width=5", "name=b"])
    assert (cfg.name, cfg.inner.width) == ("b", 5)
    (tmp_path / "again.yaml").write_text(dump_yaml(cfg))
    assert load_config(Outer, str(tmp_path / "again.yaml")) == cfg


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("name: a\ninner: {widht: 3}", [], r"c\.yaml: unknown key 'inner\.widht', did you mean 'width'"),
        ("name: a\ninner: {width: x}", [], r"c\.yaml: 'inner\.width' = 'x': .*integer"),
        ("name: a", ["inner.width=0"], r"--set inner\.width=0: .*greater than or equal to 1"),
        ("inner: {}", [], r"c\.yaml: key 'name' is required"),
        ("name: [", [], r"c\.yaml, line \d+: not valid YAML"),
        ("- a", [], r"c\.yaml: expected keys and values"),
        ("name: a", ["inner.width"], "expected key=value"),
        ("name: a", ["name.first=1"], "'name' is a single value"),
        ("name: a", ["name='b"], "--set name='b: the value is not valid YAML; text may need quotes within quotes"),
        ("name: a", ["innre.width=1"], r"^--set innre\.width=1: unknown key 'innre', did you mean 'inner'"),
        ("name: a", ["inner.width=[1, 2"], r"--set inner\.width=\[1, 2: 'inner\.width' = '\[1, 2': .*integer"),
        ("name: a\x00", [], r"c\.yaml: not valid YAML"),
        ("name: 2024-13-45", [], r"c\.yaml: not valid YAML"),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, text: str, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_config(Outer, write(tmp_path, text), overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("where", ["by_name: {d: {widht: 3}}\nin_order: []", "by_name: {}\nin_order: [{widht: 3}]"])
def test_an_unknown_key_inside_a_dict_or_a_list_is_answered_with_the_known_ones(tmp_path: Path, where: str) -> None:
    with pytest.raises(UserError, match=r"unknown key '.*widht', did you mean 'width'"):
        load_config(Named, write(tmp_path, where))
    with pytest.raises(UserError, match=r"unknown key '.*pth', expected one of width"):
        load_config(Named, write(tmp_path, where.replace("widht", "pth")))


def test_only_the_override_that_holds_the_key_is_blamed(tmp_path: Path) -> None:
    path = write(tmp_path, "name: a\ninner: {width: x}")
    with pytest.raises(UserError, match=r"c\.yaml: 'inner\.width'"):
        load_config(Outer, path, ["inn=3", "name=b"])
    with pytest.raises(UserError, match=r"--set inner=\{width: y\}: 'inner\.width'"):
        load_config(Outer, path, ["inner={width: y}"])


def test_several_mistakes_are_named_in_one_line(tmp_path: Path) -> None:
    path = write(tmp_path, "nmae: a\ninner: {widht: 3, width: x}")
    with pytest.raises(UserError) as caught:
        load_config(Outer, path, ["inner.size=1", "innre=2"])
    message = str(caught.value)
    assert message.startswith(f"{path}: key 'name' is required; 'inner.width' = 'x': ")
    assert message.endswith("; unknown key 'inner.widht', did you mean 'width'?; and 3 more")
    assert "\n" not in message
    with pytest.raises(UserError) as caught:
        load_config(Outer, write(tmp_path, "name: a\ninner: {widht: 3}"), ["innre=2"])
    assert str(caught.value) == (
        f"{path}: unknown key 'inner.widht', did you mean 'width'?; --set innre=2: unknown key 'innre', did you mean 'inner'?"
    )


def test_a_file_in_another_encoding_is_named(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes("name: Müller".encode("latin-1"))
    with pytest.raises(UserError, match=r"c\.yaml: .*not UTF-8"):
        load_config(Outer, str(tmp_path / "c.yaml"))


def test_flags_are_taken_as_they_are_and_overrides_win(tmp_path: Path) -> None:
    path = write(tmp_path, "name: a\ninner: {width: 3}")
    for name in ("*.tar", "[0-9]*.tar", "{a,b}/*.tar", "2024"):
        assert load_config(Outer, path, flags={"name": name}).name == name
    assert load_config(Outer, path, ["inner.width=5"], flags={"inner.width": 4}).inner.width == 5
    with pytest.raises(UserError, match=r"--inner\.width 0: 'inner\.width' = 0: .*greater than or equal to 1"):
        load_config(Outer, path, flags={"inner.width": 0})


def test_a_missing_file_is_named() -> None:
    with pytest.raises(UserError, match=r"nowhere\.yaml: cannot read"):
        load_config(Outer, "nowhere.yaml")


def test_help_shows_every_key_with_its_default() -> None:
    assert list(describe(Outer)) == ["  name (required)  A name.", "  inner.width (8)  Hidden width."]


class Documented(Config):
    steps: int = 3
    """Steps of the run, of which :data:`~.training.LEAST` are done
    at least; ``0`` is for 5 % of :class:`Outer`.

    One more sentence."""


def test_help_says_whole_sentences_wrapped_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = "  steps (3)  Steps of the run, of which LEAST are done at least; 0 is for 5 % of Outer. One more sentence."
    assert list(describe(Documented)) == [whole]
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    (text,) = describe(Documented)
    assert len(text.splitlines()) == 2 and max(map(len, text.splitlines())) < 60
    assert " ".join(text.split()) == " ".join(whole.split())


def attribute_docstrings(file: Path) -> Iterator[tuple[str, str]]:
    """The class, name and docstring of every annotated attribute: those of configurations are their help."""
    for node in ast.walk(ast.parse(file.read_text())):
        if not isinstance(node, ast.ClassDef):
            continue
        for attribute, text in pairwise(node.body):
            if not isinstance(attribute, ast.AnnAssign) or not isinstance(text, ast.Expr):
                continue
            if isinstance(text.value, ast.Constant) and isinstance(text.value.value, str):
                yield f"{file.name}: {node.name}.{ast.unparse(attribute.target)}", text.value.value


def test_the_help_of_every_key_says_whole_sentences() -> None:
    found = dict(pair for file in (ROOT / "instella_ray").rglob("*.py") for pair in attribute_docstrings(file))
    assert len(found) > 500
    for name, docstring in found.items():
        text = plain_text(docstring)
        assert text.endswith((".", ".)")), f"{name}: {text}"
        assert "``" not in text and ":`" not in text, f"{name}: {text}"


def test_commands_end_with_2_on_bad_input_and_130_on_ctrl_c(capsys: pytest.CaptureFixture[str]) -> None:
    def bad() -> None:
        raise UserError("prompts: expected at least one")

    def interrupted() -> None:
        raise KeyboardInterrupt

    assert run_main(bad) == 2
    assert capsys.readouterr().err == "error: prompts: expected at least one\n"
    assert run_main(interrupted) == 130
    assert run_main(lambda: None) == 0


@pytest.mark.parametrize("flags", [["--set", "sice=3"], ["--size", "60"], ["--resume"]])
def test_the_demo_refuses_bad_input_in_one_line(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["demo", "--folder", str(tmp_path / "d"), *flags]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("shards", ["*.tar", "[0-9]*.tar", "{a,b}/*.tar"])
def test_the_demos_flags_are_text_whatever_they_look_like(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["demo", "--folder", "2024", "--shards", shards]) == 2
    assert capsys.readouterr().err.startswith(f"error: {shards}: no shard found")
    assert list(tmp_path.iterdir()) == []


def test_every_shipped_configuration_loads() -> None:
    from instella_ray.data.curation.job import CurateConfig
    from instella_ray.data.encode import EncodeConfig
    from instella_ray.serving.app import ServeArgs
    from instella_ray.training.generator import GeneratorRunConfig
    from instella_ray.training.stages import TokenizerStagesConfig

    rooms: dict[str, type[Config]] = {"tokenizer": TokenizerStagesConfig, "generator": GeneratorRunConfig}
    files = [path for room in rooms for path in (ROOT / "configs" / room).glob("*.yaml")]
    assert len(files) >= 4
    for path in files:
        load_config(rooms[path.parent.name], str(path))
    for path in (ROOT / "configs" / "serve").glob("*.yaml"):
        if path.name != "deploy.yaml":  # Ray Serve's own form
            load_config(ServeArgs, str(path), section="app").check()
    given = ["input=a", "output=b"]
    for name in ("curate", "folder"):
        load_config(CurateConfig, str(ROOT / f"configs/data/{name}.yaml"), given)
    load_config(EncodeConfig, str(ROOT / "configs/data/encode.yaml"), [*given, "tokenizer=c"])


def test_the_demo_trains_what_its_configurations_say() -> None:
    from instella_ray.demo.recipe import DemoConfig, generator_config, tokenizer_config
    from instella_ray.training.generator import GeneratorRunConfig
    from instella_ray.training.tokenizer import TokenizerConfig

    demo = DemoConfig()
    shipped = load_config(TokenizerConfig, str(ROOT / "configs/tokenizer/demo.yaml"))
    assert shipped == tokenizer_config(demo, demo.path("curated", "*.tar"))
    generator = load_config(GeneratorRunConfig, str(ROOT / "configs/generator/demo.yaml"))
    assert generator == generator_config(demo, "diffusion", generator.tokenizer, ())


def test_a_renamed_key_is_answered_with_its_new_name(tmp_path: Path) -> None:
    class Counts(Config):
        images_per_shard: int = 1

    with pytest.raises(UserError, match=r"unknown key 'pictures_per_shard', did you mean 'images_per_shard'\?"):
        load_config(Counts, write(tmp_path, "pictures_per_shard: 3"))


def test_a_removed_key_is_said_to_be_gone(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"unknown key 'repa_layer', removed: it had no effect"):
        load_config(Outer, write(tmp_path, "name: a\nrepa_layer: 3"))


@pytest.mark.parametrize(
    ("flag", "hint"),
    [
        ("--from-pictures", "did you mean '--from-images'?"),
        ("--picture-bytes=9", "did you mean '--image-bytes'?"),
        ("--xyz", "expected one of --help,"),
        ("--jsn", "did you mean '--json'?"),
    ],
)
def test_an_unknown_flag_is_answered_with_the_one_that_was_meant(
    flag: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["plan", str(ROOT / "configs/generator/tiny.yaml"), flag])
    assert f"unknown argument '{flag.partition('=')[0]}', {hint}" in capsys.readouterr().err


def test_a_configuration_is_a_file_or_the_name_of_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "serve/demo" in recipes() and read_yaml("serve/demo")["app"]
    with pytest.raises(
        UserError, match="serve/dmeo: no such file, and no recipe of that name, did you mean 'serve/demo'"
    ):
        read_yaml("serve/dmeo")
    with pytest.raises(UserError, match=r"serve/demo.yaml: cannot read the configuration \(No such file"):
        read_yaml("serve/demo.yaml")
    assert read_yaml("claims") == read_yaml("bench/claims")
    with pytest.raises(UserError, match=r"^demo: no such file, and no recipe of that name"):  # there are several
        read_yaml("demo")
    (tmp_path / "serve").mkdir()
    (tmp_path / "serve" / "demo").write_text("own: file")
    assert read_yaml("serve/demo") == {"own": "file"}


@pytest.mark.parametrize("pattern", ["*.tar", "**/*.parquet", "{00000..00004}.tar", "[0-9]*.tar", "a/{b,c}.tar"])
def test_a_pattern_of_paths_needs_no_quotes(pattern: str, tmp_path: Path) -> None:
    assert load_config(Outer, write(tmp_path, "name: a"), [f"name={pattern}"]).name == pattern
