"""The frozen text encoder: every layer's features of any Hugging Face language model, without its LM head.

The generator's block i reads layer i, so a prompt becomes ``[layers, T, width]``.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import logging
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..config import Config
from ..errors import UserError

log = logging.getLogger(__name__)


class TextEncoderConfig(Config):
    """Which language model reads the prompts, and how much of it."""

    name: str = "amd/AMD-OLMo-1B"
    """Hub name, local folder, or ``package:module/folder`` for weights that an installed package carries."""
    gguf_file: str | None = None
    """File within ``name`` when the weights are GGUF."""
    layers: int | None = None
    """Use the first so many layers only; none means all."""
    max_length: int = 128
    """Tokens a prompt; longer prompts are cut with a warning."""


class TextFeatures(NamedTuple):
    """Features of a batch of prompts, left padded."""

    features: Tensor
    """``[layers, B, T, width]``, zero at padded positions."""
    mask: Tensor
    """bool ``[B, T]``, true at real tokens. All false for a prompt without tokens."""


class TextEncoder:
    """A frozen language model and its tokenizer. Not a module: nothing here is ever trained or saved."""

    def __init__(self, model: nn.Module, tokenizer: Any, cfg: TextEncoderConfig) -> None:
        self.cfg = cfg
        self.tokenizer = tokenizer
        self.tokenizer.padding_side = "left"
        self.tokenizer.truncation_side = "right"
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token or self.tokenizer.unk_token
        self.model = model.eval().requires_grad_(False)
        self.num_layers = _keep_layers(self.model, cfg.layers)
        self.width: int = self.model.config.hidden_size
        accepted = inspect.signature(self.model.forward).parameters
        self._takes_positions = "position_ids" in accepted
        self._takes_cache = "use_cache" in accepted

    @classmethod
    def from_config(
        cls, cfg: TextEncoderConfig, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> TextEncoder:
        """Load by hub name or path; code from the hub is never run. UserError where there is no such model."""
        from transformers import AutoModel, AutoTokenizer

        name = resolve_name(cfg.name)
        extra = {"gguf_file": cfg.gguf_file} if cfg.gguf_file else {}
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, **extra)
            model = AutoModel.from_pretrained(name, dtype=dtype, **extra)
        except (OSError, ValueError) as error:
            raise UserError(f"text encoder '{cfg.name}': cannot be loaded ({str(error).splitlines()[0]})") from None
        return cls(model.to(device), tokenizer, cfg)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> TextFeatures:
        """Features of ``prompts``, padded on the left to the longest of them (at least one position)."""
        rows = [self._tokens(prompt) for prompt in prompts]
        length = max([1, *map(len, rows)])
        device = next(self.model.parameters()).device
        ids = torch.full((len(rows), length), self.tokenizer.pad_token_id or 0, device=device)
        mask = torch.zeros(len(rows), length, dtype=torch.bool, device=device)
        for i, row in enumerate(rows):
            if row:
                ids[i, length - len(row) :] = torch.tensor(row, device=device)
                mask[i, length - len(row) :] = True
        # A row without any token would attend to nothing and give NaN: it sees its padding, and is cleared below.
        visible = mask | ~mask.any(1, keepdim=True)
        options: dict[str, Any] = {"use_cache": False} if self._takes_cache else {}
        if self._takes_positions:
            # Absolute positions count real tokens only, so that padding changes nothing.
            options["position_ids"] = (visible.long().cumsum(1) - 1).clamp(min=0)
        out = self.model(input_ids=ids, attention_mask=visible.long(), output_hidden_states=True, **options)
        # The first entry is the embedding. The last one is after the final norm, where the model has one.
        features = torch.stack(out.hidden_states[1:])
        return TextFeatures(features.masked_fill(~mask[None, :, :, None], 0), mask)

    @property
    def fingerprint(self) -> str:
        """Short identity of the frozen weights in use, for lineage."""
        digest = hashlib.sha256(f"{self.cfg.name}:{self.num_layers}:{self.width}".encode())
        for name, parameter in sorted(self.model.named_parameters()):
            digest.update(f"{name}:{tuple(parameter.shape)}:{parameter.double().sum().item():.6e}".encode())
        return digest.hexdigest()[:16]

    def _tokens(self, prompt: str) -> list[int]:
        ids = self.tokenizer(prompt, truncation=False)["input_ids"]
        limit = self.cfg.max_length
        if len(ids) <= limit:
            return ids
        log.warning("prompt '%s...' has %d tokens, cut to %d", prompt[:40], len(ids), limit)
        return self.tokenizer(prompt, truncation=True, max_length=limit)["input_ids"]


class TextFeatureCache:
    """Features by prompt, encoded once; the least recently used go when ``max_bytes`` are exceeded."""

    def __init__(self, encoder: TextEncoder, max_bytes: int = 1 << 30) -> None:
        self.encoder = encoder
        self.max_bytes = max_bytes
        self.bytes = 0
        self._rows: OrderedDict[str, Tensor] = OrderedDict()

    def encode(self, prompts: Sequence[str]) -> TextFeatures:
        """As :meth:`TextEncoder.encode`, running the model for prompts not seen lately only."""
        unknown = [p for p in dict.fromkeys(prompts) if p not in self._rows]
        fresh: dict[str, Tensor] = {}
        for start in range(0, len(unknown), 64):
            part = unknown[start : start + 64]
            features, mask = self.encoder.encode(part)
            for i, prompt in enumerate(part):
                fresh[prompt] = features[:, i, mask[i]].clone()
        rows = [fresh[p] if p in fresh else self._rows[p] for p in prompts]
        for prompt in dict.fromkeys(prompts):
            if prompt in fresh:
                self._rows[prompt] = fresh[prompt]
                self.bytes += fresh[prompt].nbytes
            self._rows.move_to_end(prompt)
        while self.bytes > self.max_bytes and len(self._rows) > 1:
            self.bytes -= self._rows.popitem(last=False)[1].nbytes
        return pad_features(rows)


def pad_features(rows: Sequence[Tensor]) -> TextFeatures:
    """Rows of features ``[layers, T_i, width]`` as one left-padded batch."""
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
    """A name that Transformers understands: ``package:module/folder`` becomes the installed package's folder."""
    if not name.startswith("package:"):
        return name
    module, _, folder = name.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"text encoder '{name}': package {module} is not installed (pip install {module.replace('_', '-')})"
        )
    path = Path(spec.submodule_search_locations[0]) / folder
    if not path.is_dir():
        raise UserError(f"text encoder '{name}': no folder {folder} in package {module}")
    return str(path)


def _keep_layers(model: nn.Module, wanted: int | None) -> int:
    """Drop the layers after the first ``wanted``; returns how many there are then."""
    holder, attribute = _layer_list(model)
    layers: nn.ModuleList = getattr(holder, attribute)
    if wanted is None or wanted == len(layers):
        return len(layers)
    if not 0 < wanted < len(layers):
        raise UserError(f"text encoder layers = {wanted}: the model has {len(layers)}")
    setattr(holder, attribute, layers[:wanted])
    model.config.num_hidden_layers = wanted
    # Without its later layers the model would put the final norm on a middle layer's output.
    for name in ("norm", "final_layernorm", "ln_f"):
        if hasattr(holder, name):
            setattr(holder, name, nn.Identity())
    return wanted


def _layer_list(model: nn.Module) -> tuple[nn.Module, str]:
    for holder in (model, getattr(model, "encoder", None), getattr(model, "decoder", None)):
        for attribute in ("layers", "layer", "h"):
            if holder is not None and isinstance(getattr(holder, attribute, None), nn.ModuleList):
                return holder, attribute
    raise UserError(f"text encoder: a {type(model).__name__} has no list of layers that this program knows")
