"""Each family's smallest architecture with random weights, made and saved by diffusers' own classes, offline.

`save_stand_in(family, folder)` writes the pipeline's folder as a user would find it: 8 x 8 latents (ddpm: pixels) of
16 x 16 pixels, for sana and flux2 32 x 32, for lumina2 64 x 64.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch

from support.tiny_parts import (
    WIDTH,
    autoencoder,
    clip,
    clip_tokenizer,
    gemma,
    gemma_tokenizer,
    glm,
    glm_tokenizer,
    latent_scheduler,
    qwen3,
    qwen_processor,
    qwen_tokenizer,
    qwen_vl,
    t5,
    t5_tokenizer,
    unet,
)


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


def z_image() -> Any:
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=16,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[2, 2, 4],
        axes_lens=[1024, 8, 8],
    )
    transformer.register_to_config(sample_size=8)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0)
    vae = autoencoder(shift_factor=0.06)
    return diffusers.ZImagePipeline(scheduler, vae, qwen3(), qwen_tokenizer(), transformer)


def qwen_image() -> Any:
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(2, 2, 4),
    )
    transformer.register_to_config(sample_size=8, pooled_projection_dim=768)  # the second as published
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[-0.75, 0.1, 0.9, 1.5],
        latents_std=[2.8, 1.4, 2.3, 1.2],
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
    )
    return diffusers.QwenImagePipeline(scheduler, vae, qwen_vl(), qwen_tokenizer(), transformer)


def chroma() -> Any:
    transformer = diffusers.ChromaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=2 * WIDTH,
        axes_dims_rope=(2, 2, 4),
        approximator_num_channels=16,
        approximator_hidden_dim=24,
        approximator_layers=1,
    )
    transformer.register_to_config(sample_size=8)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return diffusers.ChromaPipeline(scheduler, autoencoder(shift_factor=0.06), t5(), t5_tokenizer(), transformer)


def flux2() -> Any:
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=3 * WIDTH,
        timestep_guidance_channels=16,
        axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=False,
    )
    transformer.register_to_config(sample_size=8)
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
    )
    vae.register_to_config(force_upcast=True)  # as published
    torch.nn.init.normal_(vae.bn.running_mean)
    torch.nn.init.uniform_(vae.bn.running_var, 0.5, 2)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    encoder = qwen3("Qwen3ForCausalLM", num_layers=28)  # of which the pipeline reads the 27th
    return diffusers.Flux2KleinPipeline(scheduler, vae, encoder, qwen_tokenizer(), transformer)


def lumina2() -> Any:
    """Its pipeline takes its VAE to halve sides three times."""
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=16,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=(2, 2, 4),
        axes_lens=(300, 8, 8),
        cap_feat_dim=WIDTH,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0)
    vae = autoencoder(num_halvings=3, shift_factor=0.06)
    return diffusers.Lumina2Pipeline(transformer, scheduler, vae, gemma(2), gemma_tokenizer())


def auraflow() -> Any:
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=16,
        pos_embed_max_size=16,
    )
    for weight in transformer.time_step_proj.parameters():  # else attention is almost nothing
        weight.data.mul_(3)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.73)
    return diffusers.AuraFlowPipeline(t5_tokenizer(), t5("UMT5"), autoencoder(), transformer, scheduler)


def cogview4() -> Any:
    transformer = diffusers.CogView4Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=WIDTH,
        time_embed_dim=16,
        condition_dim=8,
        sample_size=8,
        rope_axes_dim=(16, 16),
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.25,
        max_shift=6.0,  # of 16 tokens, not of 4096: the shift is 1.75
        time_shift_type="linear",
    )
    return diffusers.CogView4Pipeline(glm_tokenizer(), glm(), autoencoder(), transformer, scheduler)


def longcat_image() -> Any:
    transformer = diffusers.LongCatImageTransformer2DModel(
        in_channels=64,  # the pipeline draws latents of 16 channels, whatever its VAE has
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(2, 2, 4),
    )
    transformer.register_to_config(sample_size=8)
    writer = qwen_vl()
    writer.generation_config.eos_token_id = list(range(writer.config.text_config.vocab_size))  # one token, not 512
    return diffusers.LongCatImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=autoencoder(16, shift_factor=0.06),
        text_encoder=writer,
        tokenizer=qwen_tokenizer(),
        text_processor=qwen_processor(),
        transformer=transformer,
    )


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
    "z_image": z_image,
    "qwen_image": qwen_image,
    "chroma": chroma,
    "flux2": flux2,
    "lumina2": lumina2,
    "auraflow": auraflow,
    "cogview4": cogview4,
    "longcat_image": longcat_image,
}
"""A new pipeline by family."""


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
