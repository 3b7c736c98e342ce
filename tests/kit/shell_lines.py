"""The shell lines of a Markdown file, and what can be said of them without running them.

Files and folders that a line names exist, jobs and ``instella-ray`` know its flags and keys, make its targets. Capitals
(``FOLDER``), ``...`` and variables stand for what a reader fills in.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

from instella_ray.config import parse_override

from .commands import check_cli, check_job, check_submission
from .project import MAKEFILE, ROOT

BLOCK = re.compile(r"^```(?:sh|bash|console)\n(.*?)^```", re.M | re.S)
BETWEEN = {"|", "||", "&&", ";", "&"}
REDIRECTIONS = {">", ">>", "<", "2>"}


def shell_lines(text: str) -> Iterator[str]:
    """Each line of the shell blocks, with those that ``\\`` continues joined and a console's ``$`` left out."""
    for block in BLOCK.findall(text):
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            if line.strip() and not line.lstrip().startswith("#"):
                yield line.removeprefix("$ ")


def commands(line: str) -> Iterator[list[str]]:
    """The commands of a line, variables set before them and redirections left out; ValueError for open quotes.

    Of a line that keeps what a command prints (``a=$(command)``), that command.
    """
    line = re.sub(r"^\w+=\$\((.*)\)$", r"\1", line)
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split = True
    words: list[str] = []
    skip = False
    for word in [*lexer, ";"]:
        if skip:
            skip = False
        elif word in REDIRECTIONS:
            skip = True
        elif word not in BETWEEN:
            words.append(word)
        elif words:
            while re.match(r"[A-Z_]+=", words[0]):
                words.pop(0)
            yield words
            words = []


def check_line(line: str) -> None:
    """AssertionError, UserError or SystemExit for a line that could not work as it stands."""
    for words in commands(line):
        check_command(words)


def check_command(words: Sequence[str]) -> None:
    program = words[0].rpartition("/")[2]
    assert program in PROGRAMS, f"{program}: not a program that these files may ask for"
    PROGRAMS[program](words)


def _python(words: Sequence[str]) -> None:
    if words[1] == "-m":
        assert importlib.util.find_spec(words[2]), words[2]
    elif words[1] == "-c":
        compile(words[2], "-c", "exec")
    elif words[1] == "jobs/submit.py":
        check_submission(words)
    elif "..." in words:
        assert (ROOT / words[1]).is_file(), words[1]
        for flag, value in pairwise(words):
            if flag == "--set":
                parse_override(value)
    else:
        check_job([re.sub(r"=\.\.\.$", "=ANY", word) for word in words])


def _make(words: Sequence[str]) -> None:
    targets = [word for word in words[1:] if "=" not in word]
    assert targets and all(re.search(rf"^{target}:", MAKEFILE, re.M) for target in targets), targets


def _instella_ray(words: Sequence[str]) -> None:
    if words[1] == "submit":
        check_submission(["python", "jobs/submit.py", *words[2:]])
        return
    check_cli(words)
    if words[1] in ("plan", "simulate"):
        _exist([words[2]])


def _ray(words: Sequence[str]) -> None:
    if words[1] in ("up", "down", "attach", "exec", "dashboard"):
        _exist(words[2:3])
    if words[1:3] == ["job", "submit"]:
        check_submission(["python", "jobs/submit.py", *words[words.index("--") :]])
    known = ("up", "down", "attach", "exec", "dashboard", "status", "job", "stack", "get-auth-token")
    assert words[1] in known, words[1]


def _kubectl(words: Sequence[str]) -> None:
    if "--" in words:
        check_command(words[words.index("--") + 1 :])
    given = [value for flag, value in pairwise(words) if flag in ("-k", "-f") and value != "-"]
    paths = [value for value in given if not value.startswith("https://")]
    _exist([*paths, *(words[2:3] if words[1] == "kustomize" else [])])


def _helm(words: Sequence[str]) -> None:
    _of_others(words)
    _exist([word for word in words if word.startswith("cluster/")])


def _docker(words: Sequence[str]) -> None:
    _exist([value for flag, value in pairwise(words) if flag == "--file"])


def _script(words: Sequence[str]) -> None:
    _exist([words[1]])


def _serve(words: Sequence[str]) -> None:
    _exist([word for word in words if word.endswith(".yaml")])


def _of_others(words: Sequence[str]) -> None:
    """Programs of which we know nothing but that they are asked for something."""
    assert len(words) > 1, words


def _exist(paths: Sequence[str]) -> None:
    assert [path for path in paths if not (ROOT / path).exists()] == [], paths


PROGRAMS: dict[str, Callable[[Sequence[str]], None]] = {
    ".": _script,
    "bash": _script,
    "docker": _docker,
    "helm": _helm,
    "instella-ray": _instella_ray,
    "kubectl": _kubectl,
    "make": _make,
    "python": _python,
    "ray": _ray,
    "serve": _serve,
    **dict.fromkeys(("curl", "gcloud", "kind", "openssl", "pip", "sed"), _of_others),
}
