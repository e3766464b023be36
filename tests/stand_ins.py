"""Each family's smallest architecture with random weights, made and saved by diffusers' own classes, offline.

`save_stand_in(family, folder)` writes the pipeline's folder as a user would find it: 16 x 16 pixels, latents of 8 x 8.
"""

import json
import string
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch

LENGTH = 16  # tokens of a prompt
WIDTH = 16  # of text encoders


def save_stand_in(family: str, folder: Path, **options: Any) -> Path:
    """Write a family's pipeline with weights of a fixed seed.  options: of its builder.  Returns the folder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        STAND_INS[family](**options).save_pretrained(folder)
    return folder


def ddpm(channels: int = 3, num_classes: int | None = None) -> Any:
    unet = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        num_class_embeds=num_classes,
    )
    return diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler())


def dit() -> Any:
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        norm_num_groups=4,
    )
    return diffusers.DiTPipeline(transformer, autoencoder(), diffusers.DDIMScheduler(clip_sample=False))


def sd(prediction_type: str = "epsilon") -> Any:
    return diffusers.StableDiffusionPipeline(
        vae=autoencoder(),
        text_encoder=clip("CLIPTextModel"),
        tokenizer=clip_tokenizer(),
        unet=unet(cross_attention_dim=WIDTH),
        scheduler=latent_scheduler(prediction_type),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl() -> Any:
    return diffusers.StableDiffusionXLPipeline(
        vae=autoencoder(),
        text_encoder=clip("CLIPTextModel"),
        text_encoder_2=clip("CLIPTextModelWithProjection"),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=unet(
            cross_attention_dim=2 * WIDTH,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + WIDTH,
        ),
        scheduler=latent_scheduler("epsilon"),
    )


STAND_INS: dict[str, Callable[..., Any]] = {"ddpm": ddpm, "dit": dit, "sd": sd, "sdxl": sdxl}
"""A new pipeline by family."""


def autoencoder(latent_channels: int = 4, **options: Any) -> Any:
    """A VAE that halves each side."""
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=latent_channels,
        norm_num_groups=4,
        sample_size=16,
        **options,
    )


def unet(**options: Any) -> Any:
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=4,
        **options,
    )


def latent_scheduler(prediction_type: str) -> Any:
    """Stable Diffusion's."""
    return diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )


def clip(name: str, width: int = WIDTH) -> Any:
    """A CLIP text encoder of transformers' class `name`."""
    import transformers

    size = len(clip_tokens())
    config = transformers.CLIPTextConfig(
        vocab_size=size,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        projection_dim=width,
        bos_token_id=size - 2,
        eos_token_id=size - 1,
        pad_token_id=size - 1,
    )
    return getattr(transformers, name)(config)


def clip_tokenizer() -> Any:
    """CLIP's tokenizer with single letters for its vocabulary."""
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        vocabulary = {token: number for number, token in enumerate(clip_tokens())}
        (Path(folder) / "vocab.json").write_text(json.dumps(vocabulary))
        (Path(folder) / "merges.txt").write_text("#version: 0.2\n")
        return transformers.CLIPTokenizer.from_pretrained(folder, model_max_length=LENGTH)


def clip_tokens() -> list[str]:
    letters = [*string.ascii_lowercase, *string.digits, *",.-'"]
    return [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
