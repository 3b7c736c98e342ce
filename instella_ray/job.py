"""Jobs: commands that run with a configuration, from ``--config`` and ``--set``."""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from . import logs
from .config import ArgumentParser, Config, add_config_arguments, describe, dump_yaml, load_config
from .errors import Interrupted

C = TypeVar("C", bound=Config)
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job(Generic[C]):
    """Command that runs with a configuration.

    A script that assigns one to ``job`` can be submitted to a cluster, which reads the configuration without running it.
    """

    name: str
    """Name of the command; that of its script has underscores for dashes."""
    config: type[C]
    run: Callable[[C], int | None]
    """Function that runs the job and returns the exit code; None is 0."""
    description: str
    flags: Mapping[str, str] = field(default_factory=dict)
    """Flags with a value that are shorthands for ``--set``, and their dotted keys."""
    switches: Mapping[str, str] = field(default_factory=dict)
    """Flags without a value, and the dotted keys that they set to true."""
    resume: str | None = None
    """Override with which the job continues an interrupted run of the same configuration."""
    folder: tuple[str, Callable[[str], Mapping[str, Any]]] | None = None
    """Help of an optional folder, and the function that returns the dotted keys for which it stands, with their values."""
    default_folder: str | None = None
    """Folder that stands where neither one nor a configuration file is given."""

    def parser(self, prog: str | None = None) -> ArgumentParser:
        """Return the parser of the job's command line; its help lists all keys of the configuration."""
        keys = list(describe(self.config))
        parser = ArgumentParser(
            prog=prog or f"{self.name.replace('-', '_')}.py",
            description=self.description,
            epilog="configuration keys:\n" + "\n".join(keys),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if self.folder:
            parser.add_argument("folder", nargs="?", metavar="FOLDER", help=self.folder[0])
        add_config_arguments(parser)
        for flag, key in self.flags.items():
            parser.add_argument(f"--{flag}", metavar="VALUE", help=f"the same as --set {key}=VALUE")
        for flag, key in self.switches.items():
            about = next(line for line in keys if line.startswith(f"  {key} ")).partition(")  ")[2].replace("%", "%%")
            parser.add_argument(f"--{flag}", action="store_true", help=f"{about} (--set {key}=true)")
        return parser

    def load(self, argv: Sequence[str] | None = None, prog: str | None = None) -> C:
        """Return the configuration of the command line ``argv`` (default: that of the process).

        Raises UserError for an invalid configuration, and SystemExit for unknown arguments and after ``--help``.
        """
        args = self.parser(prog).parse_args(argv)
        given = {flag: getattr(args, flag.replace("-", "_")) for flag in (*self.flags, *self.switches)}
        overrides = [f"{key}={given[flag]}" for flag, key in self.flags.items() if given[flag] is not None]
        overrides += [f"{key}=true" for flag, key in self.switches.items() if given[flag]]
        folder = args.folder or (None if args.config else self.default_folder) if self.folder else None
        keys = self.folder[1](folder) if self.folder and folder else {}
        return load_config(self.config, args.config, [*args.overrides, *overrides], flags=keys)

    def main(self, argv: Sequence[str] | None = None, prog: str | None = None) -> int:
        """Print the configuration of the command line ``argv`` as YAML, run the job, and return its exit code."""
        logs.begin_job(self.name.replace("-", "_"))
        config = self.load(argv, prog)
        print(dump_yaml(config), end="", flush=True)
        try:
            return self.run(config) or 0
        except Interrupted:
            if self.resume:
                log.info("continue with: %s", resume_command(prog, argv, ["--set", self.resume]))
            raise


def resume_command(prog: str | None, argv: Sequence[str] | None, resuming: Sequence[str]) -> str:
    """Return the shell command that continues an interrupted one: its words, and the words ``resuming`` where they lack.

    ``prog`` and ``argv`` are those of the command's ``main``; None stands for the script and the words of this process.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    program = ["python", sys.argv[0]] if prog is None else prog.split()
    return shlex.join([*program, *words, *(resuming if resuming[-1] not in words else ())])
