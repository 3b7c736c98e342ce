"""Sets of drawings, their licences, and their packages: fetched by npm or apt, or in a folder, checked by digests."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import yaml
from pydantic import Field

from ... import storage
from ...config import Config, did_you_mean, validate
from ...errors import UserError

ICONS = ("icons.json", "chars.json", "info.json")
"""Files of an Iconify package: drawings, names by code points, and the licence."""
SHORTCODES = tuple(f"en/shortcodes/{name}.json" for name in ("cldr", "emojibase", "github", "iamcal", "joypixels"))
WORDS = ("en/data.json", "meta/groups.json", *SHORTCODES)
"""Files of the vocabulary: names and groups of emoji, and further names."""
CLIP_ART = "usr/share/openclipart/svg"
"""Folder of the drawings of Debian's Open Clip Art."""


class IconPackage(Config):
    """Package of a registry, at a version."""

    registry: Literal["npm", "debian"] = "npm"
    package: str
    """Name at the registry."""
    version: str
    digest: str
    """SHA-256 of the list of the files that are read, each with its own (:func:`package_digest`)."""
    licence: str
    """SPDX identifier."""
    attribution: str
    """Author to name."""
    source: str
    """URL of the project."""

    @property
    def label(self) -> str:
        return f"{self.package}@{self.version}"

    def files(self, folder: Path) -> list[str]:
        """Return the names of the files to read in the unpacked package, relative to ``folder``."""
        if self.registry == "debian":
            return sorted(path.relative_to(folder).as_posix() for path in (folder / CLIP_ART).rglob("*.svg"))
        return list(ICONS if self.package.startswith("@iconify-json/") else WORDS)


class IconSet(IconPackage):
    """Set of drawings in one style."""

    style: str
    """Words for the style in captions."""
    names: dict[str, str] = Field(default_factory=dict)
    """Names of emoji by names of this set that the vocabulary lacks."""


class Licence(Config):
    """What a licence allows."""

    training: bool
    """Whether models may be trained on the drawings."""
    sharing: bool
    """Whether the drawings may be passed on."""
    condition: str


class LeftOut(Config):
    """Set that is not used."""

    package: str
    reason: str


class SetList(Config):
    """List of sets, ``sets.yaml``."""

    vocabulary: IconPackage
    sets: dict[str, IconSet]
    licences: dict[str, Licence]
    left_out: dict[str, LeftOut]

    def choose(self, names: Sequence[str]) -> dict[str, IconSet]:
        """Return the named sets; UserError for an unknown one, and for one whose licence does not allow its use."""
        for name in names:
            if name in self.left_out:
                raise UserError(f"sets: {name}: left out, {self.left_out[name].reason}")
            if name not in self.sets:
                raise UserError(f"sets: no set '{name}'{did_you_mean(name, list(self.sets))}")
            self.check_licence(name, self.sets[name].licence)
        return {name: self.sets[name] for name in names}

    def packages(self, sets: Mapping[str, IconSet]) -> list[IconPackage]:
        """Return the packages of ``sets``, after that of the vocabulary, which only those of Debian do without."""
        of_emoji = any(entry.registry != "debian" for entry in sets.values())
        return [*([self.vocabulary] if of_emoji else []), *sets.values()]

    def check_licence(self, name: str, licence: str) -> None:
        """Raise UserError unless ``licence`` is known to allow training and passing on."""
        known = self.licences.get(licence)
        if known is None or not (known.training and known.sharing):
            allowed = ", ".join(key for key, each in self.licences.items() if each.training and each.sharing)
            raise UserError(
                f"{name}: licence {licence} does not allow training and passing on; expected one of {allowed}"
            )


@cache
def set_list() -> SetList:
    """Return the list of sets that this package brings."""
    path = Path(__file__).with_name("sets.yaml")
    return validate(SetList, yaml.safe_load(path.read_text(encoding="utf-8")), path.name)


def require_available(packages: Sequence[IconPackage], sources: str | None) -> None:
    """Raise UserError unless all ``packages`` are in ``sources``, or, if that is None, their registries' clients are here."""
    for package in packages:
        if sources is None:
            _require_client("npm" if package.registry == "npm" else "apt-get")
        else:
            _source(package, sources)


@contextmanager
def unpacked(packages: Sequence[IconPackage], sources: str | None) -> Iterator[list[Path]]:
    """Yield the folders of unpacked ``packages``: those in ``sources``, or else fetched ones for the block's time.

    Raises UserError if one cannot be found or fetched, or has other files than its digest says.
    """
    with ExitStack() as stack:
        folders = []
        for package in packages:
            if sources is None:
                folder = _fetch(package, Path(stack.enter_context(TemporaryDirectory(prefix="instella-icons-"))))
            else:
                folder = _source(package, sources)
            found = package_digest(package, folder)
            if found != package.digest:
                raise UserError(f"{folder}: digest {found}, expected {package.digest} of {package.label}")
            folders.append(folder)
        yield folders


def package_digest(package: IconPackage, folder: Path) -> str:
    """Return the SHA-256 of the list of a package's files, a line "SHA-256  NAME" each; UserError if one is missing."""
    lines = [f"{storage.file_sha256(str(folder / name))}  {name}\n" for name in package.files(folder)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _source(package: IconPackage, sources: str) -> Path:
    """Return the folder of a package in ``sources``; UserError if there is none."""
    folder = Path(sources, package.package)
    if not folder.is_dir():
        raise UserError(
            f"sources {sources}: no folder {package.package}; expected unpacked packages as in node_modules"
        )
    return folder


def _require_client(command: str) -> None:
    if shutil.which(command) is None:
        raise UserError(
            f"{command}: not installed, and sources is not set; expected it, or a folder of unpacked packages in sources"
        )


def _fetch(package: IconPackage, folder: Path) -> Path:
    """Fetch and unpack a package into ``folder`` with the client of its registry; returns the folder of its files."""
    if package.registry == "debian":
        _run(["apt-get", "download", f"{package.package}={package.version}"], folder)
        _run(["dpkg-deb", "-x", next(folder.glob("*.deb")).name, "files"], folder)
        return folder / "files"
    _run(["npm", "pack", package.label], folder)
    names = [f"package/{name}" for name in package.files(folder)]
    _run(["tar", "-xzf", next(folder.glob("*.tgz")).name, *names], folder)
    return folder / "package"


def _run(command: list[str], folder: Path) -> None:
    _require_client(command[0])
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        # The last line of npm says where its log is.
        said = [line for line in done.stderr.splitlines() if line.strip() and "complete log" not in line]
        raise UserError(
            f"{' '.join(command)}: {said[-1] if said else 'no message'}; sources: a folder of unpacked packages"
        )
