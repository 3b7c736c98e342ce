"""A language model in a GGUF file gives the features of the model it was written from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from instella_ray.errors import UserError
from instella_ray.models.text_encoder import TextEncoder, TextEncoderConfig

gguf = pytest.importorskip("gguf")
pytest.importorskip("accelerate")

VOCAB = ["<unk>", "<s>", "</s>", "▁", *"abcdefghijklmnopqrstuvwxyz"]
HEADS, LAYERS = 4, 2
NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def write_llama(model: Any, path: Path) -> None:
    """``model`` and a tokenizer of letters as an unquantized GGUF file."""
    writer, config, state = gguf.GGUFWriter(path, "llama"), model.config, model.state_dict()
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // HEADS)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(len(VOCAB))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(VOCAB)
    writer.add_token_scores([-float(i) for i in range(len(VOCAB))])
    writer.add_token_types([2, 3, 3] + [1] * (len(VOCAB) - 3))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    embedding = state["embed_tokens.weight"].numpy()
    writer.add_tensor("token_embd.weight", embedding)
    writer.add_tensor("output.weight", embedding)
    writer.add_tensor("output_norm.weight", state["norm.weight"].numpy())
    for i in range(LAYERS):
        for ours, theirs in NAMES.items():
            tensor = state[f"layers.{i}.{theirs}.weight"].numpy()
            if ours in ("attn_q", "attn_k"):
                # GGUF keeps the two members of a rotary pair side by side.
                tensor = tensor.reshape(HEADS, 2, -1, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)
            writer.add_tensor(f"blk.{i}.{ours}.weight", np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_weights_give_the_features_of_their_source(tmp_path: Path) -> None:
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    model = transformers.LlamaModel(
        transformers.LlamaConfig(**sizes, vocab_size=len(VOCAB), max_position_embeddings=128, rms_norm_eps=1e-5)
    )
    write_llama(model, tmp_path / "tiny.gguf")
    config = TextEncoderConfig(name=str(tmp_path), gguf_file="tiny.gguf")
    encoder = TextEncoder.from_config(config)
    source = TextEncoder(model, encoder.tokenizer, config)
    prompts = ["abc d", "xy", ""]
    torch.testing.assert_close(encoder.encode(prompts).features, source.encode(prompts).features, atol=1e-6, rtol=0)


def test_missing_gguf_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.gguf"):
        TextEncoder.from_config(TextEncoderConfig(name=str(tmp_path), gguf_file="none.gguf"))
