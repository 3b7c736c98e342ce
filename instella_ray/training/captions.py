"""Captions of a generator's batches: tokens, order by length, and a count of the truncated ones."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from ..models.text_encoder import TextEncoder

log = logging.getLogger(__name__)


class CaptionTokenizer:
    """Tokenizer of a run's captions, which logs that some are truncated once, and how many at the end.

    Called in the loader's thread. With ``quiet``, nothing is logged.
    """

    def __init__(self, encoder: TextEncoder, *, quiet: bool = False) -> None:
        self.encoder, self.quiet = encoder, quiet
        self.count = self.truncated = 0

    def __call__(self, captions: Sequence[str]) -> list[list[int]]:
        """Return the token ids of ``captions``, tokenized in one call."""
        tokens = self.encoder.tokenize(captions)
        if tokens.truncated and not self.truncated and not self.quiet:
            log.warning(
                "%d of %d captions have more than %d tokens (text_encoder.max_length), truncated as all such ones",
                *(len(tokens.truncated), len(captions), self.encoder.cfg.max_length),
            )
        self.count += len(captions)
        self.truncated += len(tokens.truncated)
        return tokens.ids

    def close(self) -> None:
        """Log the number of captions of this worker that were truncated, if there were any."""
        if self.truncated and not self.quiet:
            log.info("%d of this worker's %d captions were truncated", self.truncated, self.count)


def longest_first(tokens: Sequence[Sequence[int]]) -> np.ndarray:
    """Return the indices of rows of tokens, int64 ``[N]``, from the longest row to the shortest; ties in their order."""
    return np.argsort([-len(row) for row in tokens], kind="stable")
