"""Each family's smallest architecture with random weights, made and saved by diffusers' own classes, offline.

`save_stand_in(family, folder)` writes the pipeline's folder as a user would find it: 8 x 8 latents (ddpm: pixels) of
16 x 16 pixels, for sana 32 x 32.
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


def sd(prediction_type: str = "epsilon", **network: Any) -> Any:
    """network: further options of its UNet."""
    return diffusers.StableDiffusionPipeline(
        vae=autoencoder(),
        text_encoder=clip("CLIPTextModel"),
        tokenizer=clip_tokenizer(),
        unet=unet(cross_attention_dim=WIDTH, **network),
        scheduler=latent_scheduler(prediction_type),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl(**network: Any) -> Any:
    """network: further options of its UNet."""
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
            **network,
        ),
        scheduler=latent_scheduler("epsilon"),
    )


def pixart(has_sizes: bool = False) -> Any:
    """PixArt-alpha.  has_sizes: as its network for 1024 pixels, which is told the image's size."""
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=12 if has_sizes else 8,  # a third of the width for each number of the size
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=24 if has_sizes else 16,
        sample_size=128 if has_sizes else 8,
        patch_size=16 if has_sizes else 2,
        caption_channels=2 * WIDTH,
    )
    return diffusers.PixArtAlphaPipeline(t5_tokenizer(), t5(), autoencoder(), transformer, latent_scheduler("epsilon"))


def pixart_sigma() -> Any:
    parts = pixart().components
    return diffusers.PixArtSigmaPipeline(**parts | {"scheduler": diffusers.DPMSolverMultistepScheduler()})


def sd3(has_t5: bool = True, **scheduler: Any) -> Any:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )
    clips = [clip("CLIPTextModelWithProjection") for _ in range(2)]
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**{"shift": 3.0} | scheduler),
        vae=autoencoder(shift_factor=0.06),
        text_encoder=clips[0],
        tokenizer=clip_tokenizer(),
        text_encoder_2=clips[1],
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5() if has_t5 else None,
        tokenizer_3=t5_tokenizer() if has_t5 else None,
    )


def flux(guidance_embeds: bool = True) -> Any:
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=2 * WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(2, 2, 4),
    )
    transformer.register_to_config(sample_size=8)  # for the pipeline's own 128 would take seconds
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=guidance_embeds),
        vae=autoencoder(shift_factor=0.06),
        text_encoder=clip("CLIPTextModel"),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5(),
        tokenizer_2=t5_tokenizer(),
        transformer=transformer,
    )


def sana() -> Any:
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=WIDTH,
        sample_size=8,
    )
    vae = diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), ()),
        decoder_qkv_multiscales=((), (), ()),
        scaling_factor=0.41407,
    )
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return diffusers.SanaPipeline(gemma_tokenizer(), gemma(), vae, transformer, scheduler)


STAND_INS: dict[str, Callable[..., Any]] = {
    "ddpm": ddpm,
    "dit": dit,
    "sd": sd,
    "sdxl": sdxl,
    "pixart": pixart,
    "pixart-sigma": pixart_sigma,
    "sd3": sd3,
    "flux": flux,
    "sana": sana,
}
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


def t5() -> Any:
    """Of twice the width, to hold two CLIPs side by side."""
    import transformers

    config = transformers.T5Config(
        vocab_size=len(t5_tokens()),
        d_model=2 * WIDTH,
        d_kv=8,
        d_ff=2 * WIDTH,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return transformers.T5EncoderModel(config)


def t5_tokenizer() -> Any:
    """T5's tokenizer with single letters for its vocabulary."""
    import transformers

    return transformers.T5Tokenizer(vocab=[(token, 0.0) for token in t5_tokens()], extra_ids=0)


def t5_tokens() -> list[str]:
    return ["<pad>", "</s>", "<unk>", "\u2581", *string.ascii_letters, *string.digits, *string.punctuation]


def gemma() -> Any:
    import transformers

    config = transformers.Gemma2Config(
        vocab_size=len(gemma_tokens()),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
    )
    return transformers.Gemma2Model(config)


def gemma_tokenizer() -> Any:
    """Gemma's tokenizer with single letters for its vocabulary."""
    import transformers

    return transformers.GemmaTokenizer(vocab={token: number for number, token in enumerate(gemma_tokens())})


def gemma_tokens() -> list[str]:
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "\u2581", "\n"]
    return [*special, *string.ascii_letters, *string.digits, *string.punctuation]


def save_sentence_encoder(folder: Path) -> Path:
    """A BERT of a few weights in the layout of all-MiniLM-L6-v2."""
    import transformers

    folder.mkdir()
    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.BertModel(transformers.BertConfig(vocab_size=len(words), **shape))
    model.save_pretrained(folder)
    return folder
