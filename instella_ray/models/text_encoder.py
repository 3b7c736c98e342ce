"""Frozen text encoder: features of every layer of a Hugging Face language model, and a cache of them.

The generator's block i reads layer i, so the features of a prompt are ``[layers, T, width]``.
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
import sys
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ..accelerator import sampling_on, upload
from ..config import Config
from ..errors import UserError

log = logging.getLogger(__name__)

CHUNK = 64
"""Maximum number of prompts that :class:`TextFeatureCache` encodes together."""
CHUNK_PADDING = 4, 0.25
"""Maximum padding of a prompt in a chunk: tokens, or a fraction of the longest prompt if that is more."""
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
    """Maximum tokens per prompt; longer prompts are truncated, with one warning for all that are encoded together."""

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


class Tokens(NamedTuple):
    """Token ids of prompts."""

    ids: list[list[int]]
    """At most ``max_length`` ids per prompt."""
    truncated: list[int]
    """Indices of the prompts that were longer."""


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
        self._causal = _is_causal(self.model)
        self._tokenizing = threading.Lock()  # a call sets the tokenizer's truncation

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

    def encode(self, prompts: Sequence[str]) -> TextFeatures:
        """Encode ``prompts``, left-padded to the longest one (at least one position); UserError if there are none."""
        if not prompts:
            raise UserError("prompts: the list is empty, expected at least one")
        return pad_features(self.rows(self.tokenize_or_warn(prompts)))

    def tokenize(self, prompts: Sequence[str]) -> Tokens:
        """Tokenize ``prompts`` in one call, without PyTorch, so that any thread may do it."""
        if not prompts:
            return Tokens([], [])
        limit, options = self.cfg.max_length, {"return_attention_mask": False, "return_token_type_ids": False}
        with self._tokenizing:
            found = self.tokenizer(list(prompts), truncation=True, max_length=limit, **options)
        ids: list[list[int]] = found["input_ids"]
        if found.encodings is not None:
            return Tokens(ids, [i for i, encoding in enumerate(found.encodings) if encoding.overflowing])
        # A tokenizer written in Python does not tell which prompts it has truncated.
        full = [i for i, row in enumerate(ids) if len(row) >= limit]
        return Tokens(ids, [i for i in full if self._length(prompts[i]) > limit])

    def tokenize_or_warn(self, prompts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of ``prompts``, with one warning if some were truncated."""
        tokens = self.tokenize(prompts)
        if tokens.truncated:
            first, others = prompts[tokens.truncated[0]], len(tokens.truncated) - 1
            more = f", and {others} more of {len(prompts)} prompts" if others else ""
            log.warning(
                "prompt '%s...' has %d tokens, truncated to %d%s",
                *(first[:40], self._length(first), self.cfg.max_length, more),
            )
        return tokens.ids

    def _length(self, prompt: str) -> int:
        with self._tokenizing:
            return len(self.tokenizer(prompt, truncation=False)["input_ids"])

    @torch.no_grad()
    def rows(self, tokens: Sequence[Sequence[int]]) -> list[Tensor]:
        """Run the model on rows of token ids at once; returns each row's features ``[layers, T, width]``.

        They are views of one tensor. Nothing is read back from the device.
        """
        # The model runs right-padded, so that default positions (rotary, learned or biases) count from the first real
        # token, and causal attention never sees padding.
        lengths = np.array([len(row) for row in tokens])
        ids = np.full((len(tokens), max(1, lengths.max())), self.tokenizer.pad_token_id or 0)
        for row, given in zip(ids, tokens, strict=True):
            row[: len(given)] = given
        # A row without tokens would attend to nothing and give NaN: one padding position is made visible, dropped below.
        visible = np.arange(ids.shape[1]) < np.maximum(lengths, 1)[:, None]
        device = next(self.model.parameters()).device
        options: dict[str, Any] = {"use_cache": False} if self._takes_cache else {}
        # Without a mask where there is nothing to hide: Transformers waits for the device to look for padding in it.
        if not (self._causal or visible.all()):
            options["attention_mask"] = upload(torch.from_numpy(visible.astype(np.int64)), device)
        with sampling_on(device):  # the same kernels in training, serving and sampling
            out = self.model(input_ids=upload(torch.from_numpy(ids), device), output_hidden_states=True, **options)
        # The first entry is the embedding, the last one includes the final norm, if any.
        features = torch.stack(out.hidden_states[1:])
        return [features[:, i, :length] for i, length in enumerate(lengths.tolist())]

    def encode_prompt(self, prompt: str) -> Tensor:
        """Encode one prompt alone: float32 ``[layers, T, width]`` without padding, on the CPU.

        What stands beside a prompt in a batch can change its features' last digits, and so the bits of an image.
        """
        (row,) = self.rows(self.tokenize_or_warn([prompt]))
        return row.float().cpu()


class TextFeatureCache:
    """LRU cache of text features by prompt, limited to ``max_bytes``.

    Features are stored without padding, in the encoder's dtype and on its device. Features of a prompt encoded in a batch
    differ from those encoded alone by rounding, which depends on the batch's shape.
    """

    def __init__(self, encoder: TextEncoder, max_bytes: int = 1 << 30) -> None:
        self.encoder = encoder
        self.max_bytes = max_bytes
        self.bytes = 0
        self.encoded: Counter[int] = Counter()
        """Number of prompts that the model has processed so far, by length with padding."""
        self._rows: OrderedDict[str, Tensor] = OrderedDict()

    @property
    def positions(self) -> int:
        """Token positions processed by the model so far, padding included; a measure of the encoding cost."""
        return sum(length * count for length, count in self.encoded.items())

    def clear(self) -> None:
        """Forget all features."""
        self._rows.clear()
        self.bytes = 0

    def encode(self, prompts: Sequence[str], tokens: Sequence[Sequence[int]] | None = None) -> TextFeatures:
        """Encode as :meth:`TextEncoder.encode`, running the model only for prompts that are not cached.

        It runs on chunks of prompts of similar length. ``tokens`` are the token ids of ``prompts``, if already known.
        """
        unknown = [p for p in dict.fromkeys(prompts) if p not in self._rows]
        if tokens is None:
            ids: dict[str, Sequence[int]] = dict(zip(unknown, self.encoder.tokenize_or_warn(unknown), strict=True))
        else:
            given = dict(zip(prompts, tokens, strict=True))
            ids = {prompt: given[prompt] for prompt in unknown}
        fresh: dict[str, Tensor] = {}
        for part in chunks(ids):
            found = self.encoder.rows([ids[prompt] for prompt in part])
            self.encoded[max(1, len(ids[part[0]]))] += len(part)
            fresh |= {prompt: row.clone() for prompt, row in zip(part, found, strict=True)}
        rows = [fresh[p] if p in fresh else self._rows[p] for p in prompts]
        for prompt in dict.fromkeys(prompts):
            if prompt in fresh:
                self._rows[prompt] = fresh[prompt]
                self.bytes += fresh[prompt].nbytes
            self._rows.move_to_end(prompt)
        while self.bytes > self.max_bytes and self._rows:
            self.bytes -= self._rows.popitem(last=False)[1].nbytes
        return pad_features(rows)


def chunks(tokens: Mapping[str, Sequence[int]]) -> Iterator[list[str]]:
    """Yield the prompts, longest first, in chunks of up to :data:`CHUNK` with little padding (:data:`CHUNK_PADDING`)."""
    part: list[str] = []
    for prompt in sorted(tokens, key=lambda prompt: -len(tokens[prompt])):
        longest = len(tokens[part[0]]) if part else 0
        if len(part) == CHUNK or longest - len(tokens[prompt]) > max(CHUNK_PADDING[0], CHUNK_PADDING[1] * longest):
            yield part
            part = []
        part.append(prompt)
    if part:
        yield part


def pad_features(rows: Sequence[Tensor]) -> TextFeatures:
    """Combine features ``[layers, T_i, width]`` into one left-padded batch."""
    lengths = [row.shape[1] for row in rows]
    length = max(1, *lengths)
    layers, _, width = rows[0].shape
    features = rows[0].new_zeros(layers, len(rows), length, width)
    for i, row in enumerate(rows):
        features[:, i, length - row.shape[1] :] = row
    mask = torch.arange(length) >= length - torch.tensor(lengths)[:, None]
    return TextFeatures(features, upload(mask, rows[0].device))


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


def _is_causal(model: Any) -> bool:
    """Return whether all attention layers of a model of Transformers are marked as causal: no token sees later ones."""
    marks = [bool(module.is_causal) for module in model.modules() if hasattr(module, "is_causal")]
    return bool(marks) and all(marks)


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
