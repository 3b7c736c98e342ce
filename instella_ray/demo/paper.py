"""The paper's recipes, end to end and small: ``python -m instella_ray.demo.paper`` (``make paper-tiny``).

Runs every file of ``configs/paper``, in its order, on a Ray of its own, and ends with the paper's tables. Inputs are made
here, models are small or stand-ins (:mod:`.paper_steps`): the numbers mean nothing. What is finished in the folder is kept.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import ray

from .. import logs, storage
from ..bulk.decode import DecodeConfig, run_decode
from ..bulk.plan import SampleConfig
from ..bulk.sample import run_sample
from ..config import ArgumentParser, load_config, recipes
from ..data.curation.job import CurateConfig, run_curate
from ..data.encode import EncodeConfig, run_encode
from ..data.generation.recaption import RecaptionConfig, run_recaption
from ..data.generation.synthesize import SynthesizeConfig, run_synthesize
from ..errors import UserError, run_main
from ..evaluation.compare import compare
from ..evaluation.evaluate import EvaluateConfig, run_evaluate
from ..evaluation.paper_tables import paper_tables
from ..training.generator import GeneratorRunConfig, run_generator
from ..training.stages import TokenizerStagesConfig, run_stages
from .paper_inputs import write_inputs
from .paper_steps import OTHERS, PaperSteps, RecipeStep
from .run import start_ray

STATE, TABLES, COMPARISON = "steps.json", "tables.md", "comparison.html"
JOBS: dict[str, tuple[Any, Callable[[Any], object]]] = {
    "curate": (CurateConfig, run_curate),
    "recaption": (RecaptionConfig, run_recaption),
    "synthesize": (SynthesizeConfig, run_synthesize),
    "encode": (EncodeConfig, run_encode),
    "evaluate": (EvaluateConfig, run_evaluate),
    "train_tokenizer": (TokenizerStagesConfig, run_stages),
    "train_generator": (GeneratorRunConfig, run_generator),
}
"""Configuration and function of each job but ``sample``, whose file has two sections."""
OTHER_NAMES = {
    "import": "curate",
    "tokenizer": "train_tokenizer",
    "diffusion": "train_generator",
    "autoregressive": "train_generator",
}


def job_of(recipe: str) -> str:
    """Return the name of the job that reads a recipe of ``configs/paper``: mostly the word after its number."""
    word = recipe.split("-")[1]
    return OTHER_NAMES.get(word, word)


class PaperRun:
    """Run of all recipes in a folder, which keeps what is finished; ``local`` runs without Ray."""

    def __init__(self, folder: Path, *, local: bool = False) -> None:
        """Read what is finished; UserError for a folder with other contents."""
        self.steps, self.local = PaperSteps(folder.absolute()), local
        self.state = self.steps.path(STATE)
        self.done: dict[str, float] = {}
        """Seconds that each finished step took."""
        if storage.exists(self.state):
            self.done = storage.read_json(self.state)
        elif not storage.is_empty(str(folder)):
            raise UserError(f"folder {folder}: not empty and not of this command; expected another one")

    def run(self, until: str | None = None) -> None:
        """Run what is not finished, up to the last run of the recipe ``until``, each with its log, and print progress."""
        steps = self.steps.all()
        if until is not None:
            names = [step.recipe for step in steps]
            if until not in names:
                raise UserError(f"until {until}: no such recipe, expected one of {', '.join(dict.fromkeys(names))}")
            steps = steps[: len(names) - names[::-1].index(until)]
        work: dict[str, Callable[[], object]] = {"inputs": partial(write_inputs, self.steps.inputs)}
        work |= {step.name: partial(self.run_step, step) for step in steps}
        for number, (name, do) in enumerate(work.items(), 1):
            if name not in self.done:
                print(f"[{number:2}/{len(work)}] {name:<48}", end="", flush=True)
                self._do(name, do)
                print(f"{self.done[name]:6.1f} s", flush=True)

    def _do(self, name: str, work: Callable[[], object]) -> None:
        """Do a step, print into its log, and note that it is finished."""
        log = Path(self.steps.path("logs"), name.replace(" (", "-").replace(")", "") + ".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        began = time.perf_counter()
        try:
            # Not closed: libraries keep the stream that they find when they are imported.
            stream = log.open("w", buffering=1)
            with redirect_stdout(stream), redirect_stderr(stream):
                work()
        except BaseException:
            print(f"not finished, see {log}")
            raise
        self.done[name] = round(time.perf_counter() - began, 1)
        storage.write_json(self.state, self.done)

    def run_step(self, step: RecipeStep) -> None:
        """Run a recipe with the step's settings; what an interrupted run has left is deleted."""
        storage.remove_tree(self.steps.path(step.output))
        recipe, job = str(recipes()[f"paper/{step.recipe}"]), job_of(step.recipe)
        if job == "sample":
            return self._sample(recipe, step.settings)
        here: dict[str, Any] = (
            {"train.workers.count": 0 if self.local else 1} if "train" in job else {"local": self.local}
        )
        cls, run = JOBS[job]
        run(load_config(cls, recipe, flags=step.settings | here))

    def _sample(self, recipe: str, settings: dict[str, Any]) -> None:
        """Sample, and decode where the recipe says so."""

        def section(name: str) -> dict[str, Any]:
            return {
                key.removeprefix(f"{name}."): value for key, value in settings.items() if key.startswith(f"{name}.")
            }

        sample = {**section("sample"), "local": self.local}
        cfg = load_config(SampleConfig, recipe, section="sample", flags=sample)
        decode = load_config(DecodeConfig, recipe, section="decode", flags=section("decode"))
        run_sample(cfg)
        if decode.format is not None:
            run_decode(decode, cfg.output, local=self.local)

    def write_tables(self) -> str:
        """Write the paper's tables and the comparison of Appendix G, and return the tables as text."""
        path = self.steps.path
        measured = [path(step.output) for step in self.steps.all() if "preset" in step.settings]
        text = "\n".join(table.text() for table in paper_tables(measured))
        about = "Rows of ours are of small models and stand-ins: the numbers mean nothing, the columns are the paper's."
        storage.write_text(path(TABLES), f"# Tables of the paper\n\n{about}\n\n{text}")
        compare(*(path(f"eval-{name}") for name in ("appendix-g", *OTHERS)), output=path(COMPARISON))
        return text


def main(argv: Sequence[str] | None = None) -> int:
    about = (__doc__ or "").partition("\n\n")[2].replace(" (:mod:`.paper_steps`)", "").replace("``", "")
    parser = ArgumentParser(prog="python -m instella_ray.demo.paper", description=about)
    parser.add_argument("--folder", default="paper-tiny", help="output folder (default: paper-tiny)")
    parser.add_argument("--fresh", action="store_true", help="delete what the folder has of an earlier run")
    parser.add_argument("--local", action="store_true", help="run all jobs in this process, without Ray")
    parser.add_argument("--until", metavar="RECIPE", help="stop after a recipe, such as 07-encode")
    args = parser.parse_args(argv)
    logs.begin_job("paper")
    began, run = time.perf_counter(), PaperRun(Path(args.folder), local=args.local)
    if args.fresh:
        storage.remove_tree(args.folder)
        run.done = {}
    if not args.local:
        start_ray()
    try:
        run.run(args.until)
    finally:
        if not args.local:
            ray.shutdown()
    if args.until is None:
        print(f"\n{run.write_tables()}\ntables: {run.steps.path(TABLES)}\nAppendix G: {run.steps.path(COMPARISON)}")
    print(f"{len(run.done)} steps, {sum(run.done.values()):.0f} s; {time.perf_counter() - began:.0f} s of them now")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
