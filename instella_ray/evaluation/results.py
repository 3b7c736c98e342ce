"""Reader of an evaluation's output folder: results, metric states, prompts and thumbnails."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from .. import storage
from ..data.formats.parts import finished_file
from ..errors import UserError
from .measure import ROWS, States
from .metrics.base import Metric
from .metrics.names import earned_name
from .metrics.states import load_state
from .thumbnails import THUMBNAILS, read_thumbnails

RESULTS, STATES = "results.json", "states"

KEYS = {"name", "about", "measured", "units", "metrics", "shown"}
"""Keys of a setting in the results that a reader needs."""

Json = dict[str, Any]


def _name_as_earned(setting: Json) -> None:
    """Give the results of a setting, which may have been recorded under an older rule, the names that they have today."""
    citations = setting.get("citations", {})
    for key, result in setting["metrics"].items():
        for row in (result, *result["parts"]):
            before = row["name"]
            made_with = (row.get(name) for name in ("weights", "weights_hash", "settings"))
            row["name"] = earned_name(before, *made_with)
        if key in citations:
            recorded = citations[key].partition(" ")[2]
            citations[key] = f"{result['name']} {recorded}"


class Evaluation:
    """Results of a finished evaluation."""

    def __init__(self, folder: str) -> None:
        """Read the results; raises UserError if the folder has no finished evaluation."""
        path = finished_file(folder, RESULTS, "evaluation")
        results = storage.read_json(path)
        try:
            self.card: Json = results["card"]
            self.settings: dict[str, Json] = {setting["name"]: setting for setting in results["settings"]}
            complete = all(setting.keys() >= KEYS for setting in self.settings.values())
        except (KeyError, TypeError, AttributeError):
            complete = False
        if not complete:
            raise UserError(f"{path}: expected the results of an evaluation")
        for setting in self.settings.values():
            _name_as_earned(setting)
        self.folder, self.states = folder, States(storage.join(folder, STATES))

    def metric(self, setting: str, name: str) -> Metric:
        """Load a metric's merged state over all units of a setting."""
        return self.states.merged(setting, self.settings[setting]["units"], name)

    def first(self, setting: str, name: str) -> Metric:
        """Load a metric's state of the first unit of a setting, which has the info of all."""
        return load_state(self.states.path(setting, self.settings[setting]["units"][0], f"{name}.npz"))

    def asked(self, setting: str) -> dict[str, tuple[str, str]]:
        """Return each sample's prompt and hash of its original, by sample id and by group id."""
        found: dict[str, tuple[str, str]] = {}
        for unit in self.settings[setting]["units"]:
            record = storage.read_json(self.states.path(setting, unit, ROWS))
            asked = list(zip(record["prompts"], record["originals"], strict=True))
            for names in (record["ids"], record["groups"]):
                found.update(zip(names, asked, strict=True))
        return found

    def images(self, setting: str) -> dict[str, Json]:
        """Return the thumbnail rows by sample id; empty if only codes were measured."""
        return self._thumbnails.get(setting, {})

    @cached_property
    def _thumbnails(self) -> dict[str, dict[str, Json]]:
        url = storage.join(self.folder, THUMBNAILS)
        return read_thumbnails(url) if storage.exists(url) else {}

    @cached_property
    def training_images(self) -> dict[str, dict[str, Json]]:
        """Return the thumbnail rows of the nearest training images by metric and id."""
        files = {name: storage.join(self.folder, file) for name, file in self.card.get("training_images", {}).items()}
        return {name: read_thumbnails(url).get("", {}) for name, url in files.items()}
