"""Print the completion script of a shell."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import shtab

from .. import logs
from ..config import ArgumentParser, recipes
from . import COMMANDS, load

PATHS = {"FILE": shtab.FILE, "FOLDER": shtab.DIRECTORY, "DIR": shtab.DIRECTORY}
"""Completions of arguments by their metavars."""
RECIPES = {
    "bash": '_instella_ray_recipes() { compgen -W \'{names}\' -- "$1"; compgen -f -- "$1"; }',
    "zsh": "_instella_ray_recipes() { compadd {names}; _files; }",
}
"""Shell functions that complete the name of a recipe, or a file."""


def parser(prog: str = "instella-ray completion") -> ArgumentParser:
    parser = ArgumentParser(
        prog=prog,
        description="Print the script with which a shell completes commands, flags, recipes and paths of instella-ray.",
        epilog="bash: instella-ray completion bash > ~/.local/share/bash-completion/completions/instella-ray; "
        "zsh: instella-ray completion zsh > FOLDER/_instella-ray, a folder of $fpath; "
        "fish: instella-ray completion fish > ~/.config/fish/completions/instella-ray.fish.",
    )
    parser.add_argument("shell", choices=("bash", "zsh", "fish"))
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "instella-ray completion") -> int:
    args = parser(prog).parse_args(argv)
    logs.begin_job("completion")
    preamble = RECIPES.get(args.shell, "").replace("{names}", " ".join(recipes()))
    print(shtab.complete(everything(), args.shell, preamble=preamble))
    return 0


def everything() -> argparse.ArgumentParser:
    """Return one parser of all commands, whose arguments say how to complete them."""
    root = argparse.ArgumentParser(prog="instella-ray")
    commands = root.add_subparsers()
    for group in COMMANDS.values():
        for name, about in group.items():
            parent = load(name).parser(f"instella-ray {name}")
            command = commands.add_parser(name, parents=[parent], add_help=False, help=about)
            for action in command._actions:
                kind = PATHS.get(str(action.metavar))
                if "--config" in action.option_strings:
                    kind = dict.fromkeys(RECIPES, "_instella_ray_recipes")
                if kind:
                    action.complete = kind  # type: ignore[attr-defined]
    return root
