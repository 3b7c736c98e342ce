"""Scoring stages of curation: one per image filter, which adds its scores and verdict to rows."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import pyarrow as pa
from PIL import Image

from ..formats.images import UndecodableError, decode_rgb
from ..formats.parts import DROPPED, KEPT, QUARANTINED
from ..stages import Pool, Stage
from .filters.base import ImageFilter, bounded
from .filters.config import FilterConfig

THREADS = 2
"""Threads per actor that decode the next batch while the model scores the current one."""


class Score:
    """Actor that runs the model of one filter, and adds its scores and verdict to the rows that are still kept.

    Rows have the columns of :data:`..formats.rows.SCHEMA`, ``verdict`` (:class:`..formats.parts.Ledger`) and ``scores`` (a
    JSON object of name to number); a call returns the table with updated ``verdict`` and ``scores``.
    """

    def __init__(self, filter: ImageFilter) -> None:
        self.filter = filter
        self.score = filter.load("cuda" if filter.gpus_per_actor else "cpu")
        self.threads = ThreadPoolExecutor(THREADS)

    def __call__(self, table: pa.Table) -> pa.Table:
        verdicts, scores = table["verdict"].to_pylist(), table["scores"].to_pylist()
        kept = [row for row, verdict in enumerate(verdicts) if verdict == KEPT]
        for rows, futures in self._ahead(table["image"], kept):
            images: dict[int, Image.Image] = {}
            for row, future in zip(rows, futures, strict=True):
                try:
                    images[row] = future.result()
                except UndecodableError as error:
                    verdicts[row] = f"{QUARANTINED}:{error}"
            found = self.score(list(images.values())) if images else []
            for row, values in zip(images, found, strict=True):
                # Rounded to six significant digits before the verdict, so that it agrees with the stored score.
                new = {name: float(f"{value:.6g}") for name, value in values.items()}
                scores[row] = json.dumps(json.loads(scores[row]) | new)
                if reason := self.filter.reason(new):
                    verdicts[row] = f"{DROPPED}:{reason}"
        for name, values in (("verdict", verdicts), ("scores", scores)):
            table = table.set_column(table.column_names.index(name), name, pa.array(values, pa.string()))
        return table

    def _ahead(
        self, images: pa.ChunkedArray, rows: Sequence[int]
    ) -> Iterator[tuple[Sequence[int], list[Future[Image.Image]]]]:
        """Yield batches of rows with the futures of their images, decoding one batch ahead."""
        waiting: deque[tuple[Sequence[int], list[Future[Image.Image]]]] = deque()
        size = self.filter.batch_size
        for start in range(0, len(rows), size):
            batch = rows[start : start + size]
            waiting.append((batch, [self.threads.submit(self._decode, images[row].as_py()) for row in batch]))
            if len(waiting) > 1:
                yield waiting.popleft()
        yield from waiting

    def _decode(self, data: bytes) -> Image.Image:
        """Decode and shrink an image, because a batch of images of 64 megapixels would take gigabytes."""
        size = self.filter.decode_size
        return bounded(decode_rgb(data, at_least=size), size)


def score_stages(filters: FilterConfig) -> list[Stage]:
    """Build one stage per image filter, each with its own pool of :class:`Score` actors."""
    sections = [section.resolved() for section in filters.of_images().values()]
    return [Stage(partial(Score, each), Pool(each.actors, each.gpus_per_actor)) for each in sections]
