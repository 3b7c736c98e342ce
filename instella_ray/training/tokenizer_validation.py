"""Validation of a tokenizer during training: reconstructs held-out images with each checkpoint and measures them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import Field, model_validator

from .. import storage
from ..accelerator import pick_device, upload
from ..data.formats.images import to_pixels, to_tensor
from ..data.formats.patterns import Pattern, absolute_pattern
from ..data.loading.image_data import ImageData, require_images
from ..errors import UserError
from ..evaluation.metric_settings import PSNR, SSIM, MetricsConfig, Tools, absolute, choose
from ..evaluation.metrics.base import Batch, Metric
from ..models.bit import BIT
from ..models.checkpoint import load_expected
from ..rendering import encode_png
from .validation import Numbers, ValidationSchedule, Validator, numbers, require_best_by
from .validation_report import IMAGE

OFFERS = frozenset({"images", "references"})


class TokenizerValidation(ValidationSchedule):
    """Held-out images, sizes, metrics and resources of a tokenizer's validation."""

    data: Pattern
    """Held-out images: curated WebDataset tars (paths or globs, comma-separated)."""
    count: int = Field(256, ge=1)
    """Number of images: the first ones, with deterministic crops."""
    sizes: tuple[int, ...] = ()
    """Pixels a side at which images are decoded and measured; none means the sizes of the training stage."""
    metrics: MetricsConfig = MetricsConfig(psnr=PSNR(), ssim=SSIM())
    """Metrics of jobs/evaluate.py that compare a reconstruction with its original."""
    best_by: str = "psnr"
    """Metric that selects the best checkpoint, over all sizes."""
    shown: int = Field(8, ge=1)
    """Number of images shown, originals above their reconstructions."""
    batch_size: int = Field(16, ge=1)
    cpus: float = Field(1.0, ge=0)
    """Logical CPUs that validation reserves. If training leaves none free, validation waits until it has ended."""
    gpus: float = Field(0.0, ge=0)
    """GPUs that validation reserves, or a fraction of one. For a run in the calling process (train.workers.count 0)
    nothing is reserved and validation runs in that process, on the GPU unless this is 0."""

    @model_validator(mode="after")
    def _metrics_compare_with_originals(self) -> TokenizerValidation:
        sections = self.metrics.sections()
        if other := [name for name, section in sections.items() if not section.needs <= OFFERS]:
            raise ValueError(f"metrics.{other[0]}: expected metrics that compare an image with its original")
        require_best_by(self.best_by, sections)
        return self


class MeasuredReconstruction(NamedTuple):
    """Metric values of a checkpoint's reconstructions, and an image of some of them."""

    numbers: Numbers
    image: np.ndarray
    """Originals above their reconstructions, uint8 ``[H, W, 3]``."""


class TokenizerValidator(Validator):
    """Validator that reconstructs images in a Ray task on any node with free resources, or in this process."""

    def __init__(self, cfg: TokenizerValidation, run_dir: str, *, here: bool) -> None:
        super().__init__(cfg, run_dir)
        self.cfg, self.here = cfg, here

    def measure(self, model: str, folder: Path) -> Numbers:
        measured = measure_restorations(model, self.cfg) if self.here else _on_cluster(model, self.cfg)
        storage.write_bytes(str(folder / IMAGE), encode_png(measured.image))
        return measured.numbers


def _on_cluster(model: str, cfg: TokenizerValidation) -> MeasuredReconstruction:
    """Run :func:`measure_restorations` in a Ray task; raises UserError if the cluster has fewer GPUs than it needs."""
    import ray
    from ray.exceptions import RayTaskError

    from ..data.ray_data import init_ray

    init_ray()
    if cfg.gpus > (have := ray.cluster_resources().get("GPU", 0)):
        raise UserError(f"gpus {cfg.gpus:g}: the cluster has {have:g}")
    task = ray.remote(num_cpus=cfg.cpus, num_gpus=cfg.gpus)(measure_restorations)
    try:
        measured: MeasuredReconstruction = ray.get(task.remote(model, cfg))
    except RayTaskError as error:
        raise error.cause from None
    return measured


@torch.inference_mode()
def measure_restorations(model: str, cfg: TokenizerValidation) -> MeasuredReconstruction:
    """Reconstruct images of ``cfg.data`` at ``cfg.sizes`` with the BIT in folder ``model``, and measure them.

    Each metric is computed over the images of all sizes; with several sizes also per size, as ``NAME_SIZE``.
    """
    device = pick_device("cuda" if cfg.gpus else "cpu")
    bit = load_expected(model, BIT, device=device)
    seen, sizes = bit.cfg.image_size, cfg.sizes or (bit.cfg.image_size,)
    data = ImageData(cfg.data, sorted({seen, *sizes}), 0)
    sections = choose(cfg.metrics, OFFERS, scenes=False)
    makers = {name: section.load(Tools(str(device))) for name, section in sections.items()}
    metrics: dict[str, Metric] = {name: make() for name, make in makers.items()}
    if len(sizes) > 1:
        metrics |= {f"{name}_{size}": make() for name, make in makers.items() for size in sizes}
    shown: list[np.ndarray] = []
    for start in range(0, min(cfg.count, len(data)), cfg.batch_size):
        index = np.arange(start, min(start + cfg.batch_size, cfg.count, len(data)))
        pixels = data.batch(0, index).pixels
        codes = bit.encode(to_tensor(upload(torch.from_numpy(pixels[seen]), device)))
        for size in sizes:
            restored, originals = to_pixels(bit.decode(codes, size, size)), pixels[size]
            # Different sizes of one image are not independent, so they form one group of the bootstrap.
            groups = [str(number) for number in index]
            batch = Batch([f"{group} at {size}" for group in groups], restored, originals, groups=groups)
            for name in makers:
                for key in {name, f"{name}_{size}"} & set(metrics):
                    metrics[key].update(batch)
            if size == sizes[-1] and len(shown) * cfg.batch_size < cfg.shown:
                shown.append(np.stack((originals, restored)))
    rows = np.concatenate(shown, axis=1)[:, : cfg.shown]
    image = np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0)
    return MeasuredReconstruction(numbers((name, metric.result().to_json()) for name, metric in metrics.items()), image)


def complete_validation(
    cfg: TokenizerValidation, sizes: tuple[int, ...], multiple: int, *, in_process: bool
) -> TokenizerValidation:
    """Return ``cfg`` with its sizes, or those that the run trains, and absolute paths.

    UserError for held-out shards without images, sizes that are not multiples of ``multiple`` (that of the
    decoder), and a GPU that this process lacks if it is to run validation ``in_process``.
    """
    if cfg.gpus and in_process and not torch.cuda.is_available():
        raise UserError(f"validation.gpus {cfg.gpus:g}: PyTorch sees no GPU in this process, which runs the validation")
    sizes = cfg.sizes or sizes
    if wrong := [size for size in sizes if size <= 0 or size % multiple]:
        raise UserError(f"validation.sizes {wrong[0]}: not a multiple of {multiple}")
    require_images(cfg.data)
    sections: dict[str, Any] = {name: absolute(section) for name, section in cfg.metrics.sections().items()}
    metrics = cfg.metrics.model_copy(update=sections)
    return cfg.model_copy(update={"data": absolute_pattern(cfg.data), "sizes": sizes, "metrics": metrics})
