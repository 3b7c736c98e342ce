"""Frozen text encoder: features of every layer of a Hugging Face language model, and a cache of them.

The generator's block i reads layer i, so the features of a prompt are ``[layers, T, width]``.
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
import sys
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ..accelerator import sampling_on
from ..config import Config
from ..errors import UserError

log = logging.getLogger(__name__)

FINAL_NORMS = ("norm", "final_norm", "final_layernorm", "final_layer_norm", "ln_f", "norm_f")
"""Attribute names of the final norm in the architectures of Transformers."""


class TextEncoderConfig(Config):
    """Settings of the text encoder: language model, number of layers and prompt length."""

    name: str = "amd/AMD-OLMo-1B"
    """Hub name, local folder, or ``package:module/folder`` for weights in an installed package."""
    gguf_file: str | None = None
    """File within ``name`` for GGUF weights."""
    layers: int | None = None
    """Number of first layers to use; none means all."""
    max_length: int = 128
    """Maximum tokens per prompt; longer prompts are truncated with a warning."""

    def absolute(self) -> TextEncoderConfig:
        """Return a copy with the absolute path of a local folder."""
        path = Path(self.name)
        return self.model_copy(update={"name": str(path.absolute())}) if path.is_dir() else self


class TextFeatures(NamedTuple):
    """Left-padded features of a batch of prompts."""

    features: Tensor
    """``[layers, B, T, width]``, zero at padded positions."""
    mask: Tensor
    """bool ``[B, T]``, true at real tokens. All false for a prompt without tokens."""


class TextEncoder:
    """Frozen language model with its tokenizer. Not a module, because it is never trained or saved."""

    def __init__(self, model: Any, tokenizer: Any, cfg: TextEncoderConfig) -> None:
        self.cfg = cfg
        self.tokenizer = tokenizer
        self.model = model.eval().requires_grad_(False)
        # The pooler of a classifier is not used, and its weights may be randomly initialized.
        if getattr(self.model, "pooler", None) is not None:
            self.model.pooler = None
        self.num_layers = _keep_layers(self.model, cfg.layers)
        self.width: int = self.model.config.hidden_size
        self._takes_cache = "use_cache" in inspect.signature(self.model.forward).parameters

    @classmethod
    def from_config(
        cls, cfg: TextEncoderConfig, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> TextEncoder:
        """Load by hub name or path, without executing code from the hub; UserError if loading fails.

        ``dtype`` is the dtype of weights and features.
        """
        from transformers import AutoModel, AutoTokenizer

        name = resolve_name(cfg.name)
        extra = {"gguf_file": cfg.gguf_file} if cfg.gguf_file else {}
        try:
            with _bars_on_terminals_only():
                tokenizer = AutoTokenizer.from_pretrained(name, **extra)
                model = AutoModel.from_pretrained(name, dtype=dtype, **extra)
        except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"text encoder '{cfg.name}': cannot be loaded ({reason})") from None
        return cls(model.to(device), tokenizer, cfg)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> TextFeatures:
        """Encode ``prompts``, left-padded to the longest one (at least one position); UserError if there are none."""
        if not prompts:
            raise UserError("prompts: the list is empty, expected at least one")
        rows = [self._tokens(prompt) for prompt in prompts]
        # The model runs right-padded, so that default positions (rotary, learned or biases) count from the first real
        # token, and causal attention never sees padding.
        length = max([1, *map(len, rows)])
        device = next(self.model.parameters()).device
        ids = torch.full((len(rows), length), self.tokenizer.pad_token_id or 0)
        visible = torch.zeros(len(rows), length, dtype=torch.long)
        # A row without tokens would attend to nothing and give NaN: one padding position is made visible, dropped below.
        visible[:, 0] = 1
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row, dtype=torch.long)
            visible[i, : len(row)] = 1
        options = {"use_cache": False} if self._takes_cache else {}
        with sampling_on(device):  # the same kernels in training, serving and sampling
            out = self.model(
                input_ids=ids.to(device), attention_mask=visible.to(device), output_hidden_states=True, **options
            )
        # The first entry is the embedding, the last one includes the final norm, if any.
        features = torch.stack(out.hidden_states[1:])
        return pad_features([features[:, i, : len(row)] for i, row in enumerate(rows)])

    def encode_prompt(self, prompt: str) -> Tensor:
        """Encode one prompt alone: float32 ``[layers, T, width]`` without padding, on the CPU.

        What stands beside a prompt in a batch can change its features' last digits, and so the bits of an image.
        """
        features, mask = self.encode([prompt])
        return features[:, 0, mask[0]].float().cpu()

    def _tokens(self, prompt: str) -> list[int]:
        ids = self.tokenizer(prompt, truncation=False)["input_ids"]
        limit = self.cfg.max_length
        if len(ids) <= limit:
            return ids
        log.warning("prompt '%s...' has %d tokens, truncated to %d", prompt[:40], len(ids), limit)
        return self.tokenizer(prompt, truncation=True, max_length=limit)["input_ids"]


class TextFeatureCache:
    """LRU cache of text features by prompt, limited to ``max_bytes``.

    Features are stored without padding, in the encoder's dtype and on its device. Features of a prompt encoded in a batch
    differ from those encoded alone by rounding, which depends on the batch's shape.
    """

    def __init__(self, encoder: TextEncoder, max_bytes: int = 1 << 30) -> None:
        self.encoder = encoder
        self.max_bytes = max_bytes
        self.bytes = 0
        self.positions = 0
        """Token positions processed by the model so far, padding included; a measure of the encoding cost."""
        self._rows: OrderedDict[str, Tensor] = OrderedDict()

    def encode(self, prompts: Sequence[str]) -> TextFeatures:
        """Encode as :meth:`TextEncoder.encode`, running the model only for prompts that are not cached."""
        unknown = [p for p in dict.fromkeys(prompts) if p not in self._rows]
        fresh: dict[str, Tensor] = {}
        for start in range(0, len(unknown), 64):
            part = unknown[start : start + 64]
            features, mask = self.encoder.encode(part)
            self.positions += mask.numel()
            for i, prompt in enumerate(part):
                fresh[prompt] = features[:, i, mask[i]].clone()
        rows = [fresh[p] if p in fresh else self._rows[p] for p in prompts]
        for prompt in dict.fromkeys(prompts):
            if prompt in fresh:
                self._rows[prompt] = fresh[prompt]
                self.bytes += fresh[prompt].nbytes
            self._rows.move_to_end(prompt)
        while self.bytes > self.max_bytes and self._rows:
            self.bytes -= self._rows.popitem(last=False)[1].nbytes
        return pad_features(rows)


def pad_features(rows: Sequence[Tensor]) -> TextFeatures:
    """Combine features ``[layers, T_i, width]`` into one left-padded batch."""
    length = max([1, *(row.shape[1] for row in rows)])
    layers, _, width = rows[0].shape
    features = rows[0].new_zeros(layers, len(rows), length, width)
    mask = torch.zeros(len(rows), length, dtype=torch.bool, device=rows[0].device)
    for i, row in enumerate(rows):
        if row.shape[1]:
            features[:, i, length - row.shape[1] :] = row
            mask[i, length - row.shape[1] :] = True
    return TextFeatures(features, mask)


def resolve_name(name: str) -> str:
    """Resolve ``package:module/folder`` to a folder of an installed package; other names are returned unchanged.

    UserError if the package or folder is missing.
    """
    if not name.startswith("package:"):
        return name
    module, _, folder = name.removeprefix("package:").partition("/")
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):  # missing parent package, or empty name
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"text encoder '{name}': package {module} is not installed (pip install {module.replace('_', '-')})"
        )
    path = Path(spec.submodule_search_locations[0]) / folder
    if not path.is_dir():
        raise UserError(f"text encoder '{name}': no folder {folder} in package {module}")
    return str(path)


@contextmanager
def _bars_on_terminals_only() -> Iterator[None]:
    """Hide the progress bars of Transformers, of downloads and of loading, where each state would be a line of a log."""
    from transformers.utils import logging as bars

    hidden = bars.is_progress_bar_enabled() and not sys.stderr.isatty()
    if hidden:
        bars.disable_progress_bar()
    try:
        yield
    finally:
        if hidden:
            bars.enable_progress_bar()


def _keep_layers(model: Any, wanted: int | None) -> int:
    """Keep the first ``wanted`` layers and return their number; UserError if the model cannot be truncated so.

    The remaining layers give the same features as in the whole model. A middle layer's output does not include the final
    norm, which is therefore removed too.
    """
    count: int = model.config.num_hidden_layers
    if wanted is None or wanted == count:
        return count
    if not 0 < wanted < count:
        raise UserError(f"text encoder layers = {wanted}: expected 1 to {count}, the model's number of layers")
    for holder in model.modules():
        for name, child in holder.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == count:
                setattr(holder, name, child[:wanted])
                model.config.num_hidden_layers = wanted
                for norm in FINAL_NORMS:
                    if getattr(holder, norm, None) is not None:
                        setattr(holder, norm, nn.Identity())
                return wanted
    raise UserError(f"text encoder layers = {wanted}: a {type(model).__name__} can only be used whole")
