"""Names of the metrics that a run logs, which are checked before it starts, and not at its first checkpoint."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from ..config import did_you_mean
from ..errors import UserError
from .generator_loss import TIME_NAMES
from .settings import HELD_OUT, TrainConfig

EVERY_RUN = (
    "loss",
    "lr",
    "gradient_norm",
    "gradient_norm_max",
    "images_per_second",
    "data_wait",
    "flops_per_second",
    "memory_gb",
)
GENERATOR = ("bit_accuracy",)
DIFFUSION = (*GENERATOR, *TIME_NAMES)
BITS = (
    "bit_mean",
    "bit_mean_lowest",
    "bit_mean_highest",
    "bit_entropy",
    "bit_entropy_worst",
    "dead_bits",
    "dead_bits_worst",
)
TOKENIZER = ("reconstruction", "psnr", "code_loss", *BITS)
ADVERSARY = ("adversarial", "adversarial_weight", "discriminator", "logits_true", "logits_restored")
TRAINING_ONLY = frozenset(("code_loss", *BITS, *ADVERSARY, "output_size"))
"""Parts of a tokenizer's loss that held-out samples do not have."""


def logged_metrics(train: TrainConfig, own: Sequence[str]) -> tuple[str, ...]:
    """Return the names in ``metrics.jsonl`` of a run whose losses have the parts ``own``."""
    gpu = ("mfu",) if train.workers.gpu else ()
    skipped = ("skipped_batches",) if train.on_nonfinite == "skip" else ()
    parts = ("loss", "loss_raw", *(name for name in own if name not in TRAINING_ONLY))
    held_out = parts if train.held_out is not None else ()
    return (*EVERY_RUN, *own, *gpu, *skipped, *(HELD_OUT + name for name in held_out))


def check_keep_best(train: TrainConfig, own: Collection[str]) -> None:
    """Raise UserError if ``train.keep_best`` names a metric that a run whose losses have the parts ``own`` never logs."""
    if train.keep_best is None:
        return
    name, known = train.keep_best.metric, logged_metrics(train, tuple(own))
    if name not in known:
        raise UserError(f"train.keep_best.metric '{name}': not logged by this run{did_you_mean(name, known)}")
