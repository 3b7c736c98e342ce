"""Tiny models of the classes that the jobs load, with random weights: they compute as the large ones do, nonsense.

A rehearsal on a machine without the large ones runs with them, such as :mod:`.paper`, and so do the tests. Each function
saves a model to a folder, as ``save_pretrained`` leaves it, and returns the folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    OlmoConfig,
    OlmoModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    T5Config,
    T5EncoderModel,
)

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
THINGS = ("a", "red", "blue", "round", "square", "ball", "box", "lies", "stands", "beside", "under", "on")
WORDS = [word + end for word in THINGS for end in ("", ".")]
TEMPLATE = (
    "{% for m in messages %}<|im_start|> {{ m.role }} {% for c in m.content %}"
    "{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %} {{ c.text }} {% endif %}"
    "{% endfor %}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)


def word_tokenizer(*special: str, known: Sequence[str] = WORDS) -> PreTrainedTokenizerFast:
    """Build a tokenizer of the ``known`` words, separated by spaces; others are unknown."""
    vocabulary = {word: i for i, word in enumerate((*special, "<unk>", *known))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens(list(special))
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")


def _saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def save_captioner(folder: Path, seed: int = 0) -> Path:
    """Save a Qwen2.5-VL of two layers with its processor."""
    words = word_tokenizer(*SPECIAL, "<|video_pad|>")
    words.eos_token, words.pad_token = "<|im_end|>", "<|endoftext|>"
    video: Any = words.convert_tokens_to_ids("<|video_pad|>")
    ids = {word: words.get_vocab()[word] for word in SPECIAL}
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(patch_size=4, merge_size=2, min_pixels=64, max_pixels=64 * 64),
        words,
        Qwen2VLVideoProcessor(patch_size=4, merge_size=2),
        chat_template=TEMPLATE,
    )
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "initializer_range": 0.3}
    config: Any = Qwen2_5_VLConfig(
        text_config={
            **sizes,
            "vocab_size": len(words),
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
            "bos_token_id": None,
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={
            **sizes,
            "depth": 2,
            "num_heads": 2,
            "patch_size": 4,
            "window_size": 16,
            "out_hidden_size": 32,
            "fullatt_block_indexes": [1],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=video,
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    # As Qwen's own settings do, these sample.
    ends, settings = [ids["<|im_end|>"], ids["<|endoftext|>"]], model.generation_config
    settings.update(do_sample=True, temperature=0.7, repetition_penalty=1.05, eos_token_id=ends)
    _saved(model, folder)
    return _saved(processor, folder)


def save_language_model(folder: Path, words: Sequence[str]) -> Path:
    """Save an OLMo of two layers, which knows ``words``, with its tokenizer."""
    known = word_tokenizer("<pad>", "</s>", known=words)
    known.pad_token, known.eos_token = "<pad>", "</s>"
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    _saved(OlmoModel(OlmoConfig(vocab_size=len(known), pad_token_id=0, eos_token_id=1, **sizes)), folder)
    return _saved(known, folder)


def _vae(channels: int, blocks: int = 2) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8,) * (blocks - 1) + (16,),
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=channels,
        scaling_factor=0.5,
        shift_factor=0.0,
    )


def _prompt_tokenizer() -> PreTrainedTokenizerFast:
    words = word_tokenizer("<pad>", "</s>")
    words.pad_token, words.eos_token, words.model_max_length = "<pad>", "</s>", 16
    return words


def _clip(kind: type, tokens: int) -> Any:
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    ids: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
    return kind(CLIPTextConfig(vocab_size=tokens, max_position_embeddings=16, projection_dim=16, **sizes, **ids))


def _t5(tokens: int, width: int) -> T5EncoderModel:
    return T5EncoderModel(T5Config(vocab_size=tokens, d_model=width, d_ff=32, d_kv=8, num_layers=1, num_heads=2))


def save_flux(folder: Path) -> Path:
    """Save a FLUX of one double and one single block, with its two text encoders."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(0)
    words = _prompt_tokenizer()
    network = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=[2, 2, 4],
    )
    clip, t5 = _clip(CLIPTextModel, len(words)), _t5(len(words), 16)
    return _saved(FluxPipeline(FlowMatchEulerDiscreteScheduler(), _vae(1), clip, words, t5, words, network), folder)


def save_stable_diffusion_3(folder: Path) -> Path:
    """Save a Stable Diffusion 3 of one block, with its three text encoders."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    torch.manual_seed(1)
    words = _prompt_tokenizer()
    network = SD3Transformer2DModel(
        sample_size=16,
        patch_size=1,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=32,
    )
    first, second = (_clip(CLIPTextModelWithProjection, len(words)) for _ in range(2))
    third = _t5(len(words), 32)
    scheduler, vae = FlowMatchEulerDiscreteScheduler(), _vae(4)
    parts = (network, scheduler, vae, first, words, second, words, third, words)
    return _saved(StableDiffusion3Pipeline(*parts), folder)


def save_pixart(folder: Path, kind: str = "Sigma") -> Path:
    """Save a PixArt of one block, of the ``kind`` Alpha or Sigma."""
    import diffusers

    torch.manual_seed(3)
    words = _prompt_tokenizer()
    network = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=32,  # one of those whose sizes PixArt knows
        patch_size=2,
        use_additional_conditions=False,
    )
    pipeline = getattr(diffusers, f"PixArt{kind}Pipeline")
    parts = {"tokenizer": words, "text_encoder": _t5(len(words), 16), "vae": _vae(4, 4), "transformer": network}
    return _saved(pipeline(**parts, scheduler=diffusers.DPMSolverMultistepScheduler()), folder)


def save_stable_diffusion(folder: Path, checker: Any = None, reader: Any = None) -> Path:
    """Save a Stable Diffusion 1 of two blocks; ``checker`` and ``reader`` are its safety checker and image processor."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    torch.manual_seed(2)
    words = _prompt_tokenizer()
    network, clip = _unet(16), _clip(CLIPTextModel, len(words))
    parts = (_vae(4), clip, words, network, DDIMScheduler(steps_offset=1, clip_sample=False), checker, reader)
    return _saved(StableDiffusionPipeline(*parts, requires_safety_checker=checker is not None), folder)


def save_stable_diffusion_xl(folder: Path) -> Path:
    """Save a Stable Diffusion XL of two blocks, with its two text encoders."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    torch.manual_seed(4)
    words = _prompt_tokenizer()
    clips = _clip(CLIPTextModel, len(words)), _clip(CLIPTextModelWithProjection, len(words))
    sizes = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    network = _unet(32, **sizes, projection_class_embeddings_input_dim=6 * 8 + 16)
    parts = (_vae(4), *clips, words, words, network, EulerDiscreteScheduler())
    return _saved(StableDiffusionXLPipeline(*parts, add_watermarker=False), folder)


def _unet(text_width: int, **further: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=text_width,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **further,
    )
