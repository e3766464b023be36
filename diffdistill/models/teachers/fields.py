"""What becomes of each field of the configs of diffusers' classes that are loaded: a table for each class.

A field is used (its class is built with it, or it is read here), harmless whatever it says, or right at some values
alone, and refused with any other. A field that no table knows, of a newer diffusers than this was written for, is
refused as well unless it is empty: a network that is read without it may be another one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any

from diffdistill.settings.schema import UserError


@dataclass(frozen=True)
class Only:
    """values: those at which nothing is lost.  why: what is amiss with any other, for the message."""

    values: tuple[object, ...]
    why: str


@dataclass(frozen=True)
class Fields:
    """The fields of one class.  used: see above.  harmless, only: by field, the first with the reason."""

    used: frozenset[str]
    harmless: Mapping[str, str] = field(default_factory=dict)
    only: Mapping[str, Only] = field(default_factory=dict)

    @property
    def known(self) -> frozenset[str]:
        return self.used | self.harmless.keys() | self.only.keys()


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


STEPS = "of the pipeline's own steps; ours are those of `sampler`"
AVERAGE = "of the average that training kept, by diffusers' EMAModel"
DTYPE = "of the files; all is loaded in float32"
NOT_TOLD = "the network is told more than prompt, class and time, which it is not here"
EXTRAS = {
    **dict.fromkeys(("decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step"), AVERAGE),
    **dict.fromkeys(("use_ema_warmup", "collected_params"), AVERAGE),
    **dict.fromkeys(("dtype", "torch_dtype"), DTYPE),
    "quantization_config": "refused, with a message of its own, wherever weights are read or copied",
}
"""That published configs hold, and no class takes."""

_PLAIN = Only(("default", None), "layers for grounding (GLIGEN) or regional prompts, which are not given here")
_OF_STUDENTS = Only((None,), "is of a scheduler for students, whose steps are of no path")
_UNET = (
    "sample_size in_channels out_channels center_input_sample flip_sin_to_cos freq_shift down_block_types "
    "mid_block_type up_block_types block_out_channels layers_per_block downsample_padding mid_block_scale_factor "
    "dropout act_fn norm_num_groups norm_eps attention_head_dim resnet_time_scale_shift time_embedding_dim"
)
_TRANSFORMER = (
    "num_attention_heads attention_head_dim in_channels out_channels num_layers dropout norm_num_groups attention_bias "
    "sample_size patch_size activation_fn num_embeds_ada_norm upcast_attention norm_type norm_elementwise_affine "
    "norm_eps"
)

NETWORKS: Mapping[str, Fields] = {
    "UNet2DModel": Fields(
        _names(f"{_UNET} downsample_type upsample_type attn_norm_num_groups add_attention num_class_embeds"),
        {"num_train_timesteps": "of learned embeddings of time alone"},
        {
            "class_embed_type": Only((None,), "classes are numbers here, each with an embedding of its own"),
            "time_embedding_type": Only(
                ("positional",), "this network is told noise levels or whole steps; here it is told any time"
            ),
        },
    ),
    "UNet2DConditionModel": Fields(
        _names(
            f"{_UNET} only_cross_attention cross_attention_dim transformer_layers_per_block "
            "reverse_transformer_layers_per_block num_attention_heads dual_cross_attention use_linear_projection "
            "addition_embed_type addition_time_embed_dim upcast_attention resnet_skip_time_act "
            "resnet_out_scale_factor time_embedding_type time_embedding_act_fn timestep_post_act time_cond_proj_dim "
            "conv_in_kernel conv_out_kernel projection_class_embeddings_input_dim mid_block_only_cross_attention "
            "cross_attention_norm addition_embed_type_num_heads encoder_hid_dim"
        ),
        {"class_embeddings_concat": "of networks with class embeddings, which are refused"},
        {
            "class_embed_type": Only((None,), NOT_TOLD),
            "num_class_embeds": Only((None,), NOT_TOLD),
            "encoder_hid_dim_type": Only((None, "text_proj"), NOT_TOLD),
            "attention_type": _PLAIN,
        },
    ),
    "DiTTransformer2DModel": Fields(
        _names(_TRANSFORMER),
    ),
    "Transformer2DModel": Fields(  # of diffusers before 0.29; loaded by the class of its family
        _names(f"{_TRANSFORMER} cross_attention_dim caption_channels interpolation_scale use_additional_conditions"),
        only={
            "num_vector_embeds": Only((None,), "a network on vectors, not on images"),
            "use_linear_projection": Only((False, None), "a network on maps, not on patches"),
            "only_cross_attention": Only((False, None), "other blocks than those of its family"),
            "double_self_attention": Only((False, None), "other blocks than those of its family"),
            "attention_type": _PLAIN,
        },
    ),
    "PixArtTransformer2DModel": Fields(
        _names(f"{_TRANSFORMER} cross_attention_dim interpolation_scale use_additional_conditions caption_channels"),
        only={"attention_type": _PLAIN},
    ),
    "SD3Transformer2DModel": Fields(
        _names(
            "sample_size patch_size in_channels num_layers attention_head_dim num_attention_heads joint_attention_dim "
            "caption_projection_dim pooled_projection_dim out_channels pos_embed_max_size dual_attention_layers "
            "qk_norm"
        ),
    ),
    "FluxTransformer2DModel": Fields(
        _names(
            "in_channels out_channels num_layers num_single_layers attention_head_dim num_attention_heads "
            "joint_attention_dim pooled_projection_dim guidance_embeds axes_dims_rope sample_size"
        ),
        only={"patch_size": Only((1,), "its tokens are packed by the pipeline")},
    ),
    "LongCatImageTransformer2DModel": Fields(
        _names(
            "in_channels num_layers num_single_layers attention_head_dim num_attention_heads joint_attention_dim "
            "axes_dims_rope sample_size"
        ),
        {"pooled_projection_dim": "of no layer"},
        {"patch_size": Only((1,), "its tokens are packed by the pipeline")},
    ),
    "SanaTransformer2DModel": Fields(
        _names(
            "in_channels out_channels num_attention_heads attention_head_dim num_layers num_cross_attention_heads "
            "cross_attention_head_dim cross_attention_dim caption_channels mlp_ratio dropout attention_bias "
            "sample_size patch_size norm_elementwise_affine norm_eps interpolation_scale qk_norm "
            "timestep_scale"
        ),
        {"guidance_embeds_scale": "of networks that are told the guidance scale, which are refused"},
        {"guidance_embeds": Only((False,), "a student already (Sprint), which is told a guidance scale")},
    ),
    "ZImageTransformer2DModel": Fields(
        _names(
            "in_channels dim n_layers n_refiner_layers n_heads n_kv_heads norm_eps qk_norm cap_feat_dim rope_theta "
            "t_scale axes_dims axes_lens sample_size"
        ),
        only={
            "all_patch_size": Only(((2,), [2]), "tokens are of 2 x 2 latents"),
            "all_f_patch_size": Only(((1,), [1]), "tokens are of one frame"),
            "siglip_feat_dim": Only((None,), "a network that is also given images"),
        },
    ),
    "QwenImageTransformer2DModel": Fields(
        _names(
            "in_channels out_channels num_layers attention_head_dim num_attention_heads joint_attention_dim "
            "axes_dims_rope sample_size"
        ),
        {"pooled_projection_dim": "of before it was published; no layer has it"},
        {
            "patch_size": Only((2,), "its tokens are packed by the pipeline, by 2 x 2"),
            "guidance_embeds": Only((False,), "a student already, which is told a guidance scale"),
            **dict.fromkeys(("zero_cond_t", "use_additional_t_cond", "use_layer3d_rope"), Only((False,), NOT_TOLD)),
        },
    ),
    "ChromaTransformer2DModel": Fields(
        _names(
            "in_channels out_channels num_layers num_single_layers attention_head_dim num_attention_heads "
            "joint_attention_dim axes_dims_rope approximator_num_channels approximator_hidden_dim approximator_layers "
            "sample_size"
        ),
        only={"patch_size": Only((1,), "its tokens are packed by the pipeline")},
    ),
    "Flux2Transformer2DModel": Fields(
        _names(
            "in_channels out_channels num_layers num_single_layers attention_head_dim num_attention_heads "
            "joint_attention_dim timestep_guidance_channels mlp_ratio axes_dims_rope rope_theta eps sample_size"
        ),
        {"guidance_embeds": "of an input that the pipeline gives no number"},
        {"patch_size": Only((1,), "its tokens are packed by the pipeline")},
    ),
    "Lumina2Transformer2DModel": Fields(
        _names(
            "sample_size patch_size in_channels out_channels hidden_size num_layers num_refiner_layers "
            "num_attention_heads num_kv_heads multiple_of ffn_dim_multiplier norm_eps axes_dim_rope axes_lens "
            "cap_feat_dim"
        ),
        {"scaling_factor": "that its class does not use"},
    ),
    "AuraFlowTransformer2DModel": Fields(
        _names(
            "patch_size in_channels num_mmdit_layers num_single_dit_layers attention_head_dim num_attention_heads "
            "joint_attention_dim caption_projection_dim out_channels pos_embed_max_size"
        ),
        {"sample_size": "half of what its pipeline makes; the positions tell how large images may be"},
    ),
    "CogView4Transformer2DModel": Fields(
        _names(
            "in_channels out_channels num_layers attention_head_dim num_attention_heads text_embed_dim time_embed_dim "
            "condition_dim sample_size rope_axes_dim"
        ),
        {"pos_embed_max_size": "that its class does not use"},
        {"patch_size": Only((2,), "tokens are of 2 x 2 latents")},
    ),
}
"""Of the networks, by class."""

VAES: Mapping[str, Fields] = {
    "AutoencoderKL": Fields(
        _names(
            "in_channels out_channels down_block_types up_block_types block_out_channels layers_per_block act_fn "
            "latent_channels norm_num_groups sample_size scaling_factor shift_factor latents_mean latents_std "
            "use_quant_conv use_post_quant_conv mid_block_add_attention"
        ),
        {"force_upcast": "of half precision"},
    ),
    "AutoencoderDC": Fields(
        _names(
            "in_channels latent_channels attention_head_dim encoder_block_types decoder_block_types "
            "encoder_block_out_channels decoder_block_out_channels encoder_layers_per_block decoder_layers_per_block "
            "encoder_qkv_multiscales decoder_qkv_multiscales upsample_block_type downsample_block_type "
            "decoder_norm_types decoder_act_fns encoder_out_shortcut decoder_in_shortcut decoder_conv_act_fn "
            "scaling_factor"
        ),
    ),
    "AutoencoderKLQwenImage": Fields(
        _names(
            "base_dim z_dim dim_mult num_res_blocks attn_scales temperal_downsample dropout input_channels "
            "latents_mean latents_std"
        ),
    ),
    "AutoencoderKLFlux2": Fields(
        _names(
            "in_channels out_channels down_block_types up_block_types block_out_channels decoder_block_out_channels "
            "layers_per_block act_fn latent_channels norm_num_groups sample_size use_quant_conv use_post_quant_conv "
            "mid_block_add_attention batch_norm_eps"
        ),
        {"batch_norm_momentum": "of training", "force_upcast": "of half precision"},
        {"patch_size": Only(((2, 2), [2, 2]), "latents are patches of 2 x 2")},
    ),
}
"""Of the VAEs, by class."""

SCHEDULER = Fields(
    _names(
        "num_train_timesteps beta_start beta_end beta_schedule trained_betas prediction_type rescale_betas_zero_snr "
        "shift flow_shift use_flow_sigmas use_dynamic_shifting base_shift max_shift base_image_seq_len "
        "max_image_seq_len sigma_data sigma_min sigma_max"
    ),
    dict.fromkeys(
        _names(
            "variance_type timestep_spacing steps_offset set_alpha_to_one skip_prk_steps interpolation_type "
            "use_karras_sigmas use_exponential_sigmas use_beta_sigmas use_lu_lambdas final_sigmas_type solver_order "
            "solver_type solver_p algorithm_type lower_order_final euler_at_final lambda_min_clipped predict_x0 "
            "disable_corrector original_inference_steps timestep_scaling eta s_noise "
            "predictor_order corrector_order tau_func sigma_schedule rho scale_factors upscale_mode "
            "stochastic_sampling clip_sample clip_sample_range sample_max_value dynamic_thresholding_ratio "
            "tensor_format timestep_values shift_terminal"
        ),
        STEPS,
    ),
    {
        "time_shift_type": Only(("exponential", "linear", None), "is not read; choose from exponential, linear"),
        "thresholding": Only((False, None), "its pipeline moves each estimate by the quantiles of its pixels"),
        "timestep_type": Only(("discrete", None), "the network is told noise levels, not steps"),
        "invert_sigmas": Only((False, None), "not supported; use a scheduler without it"),
        "predict_epsilon": Only((True, None), "is of an older diffusers; say prediction_type: sample"),
        "snr_shift_scale": Only((None, 1.0), "moves the schedule of betas"),
        **dict.fromkeys(("stages", "stage_range", "gamma", "scheduler_type"), _OF_STUDENTS),
        **dict.fromkeys(("eps", "final_step_size_scale", "num_policy_substeps", "n_grid"), _OF_STUDENTS),
    },
)
"""Of every scheduler: published configs hold fields of others than the class that they name."""


def check_fields(config: Mapping[str, Any], fields: Fields, file: FilePath | str) -> None:
    """Raise UserError on a field of a config.json that is not understood, or at a value that is not."""
    for name, value in config.items():
        only = fields.only.get(name)
        if only and not any(value is one or value == one for one in only.values):
            raise UserError(f"{file}: {name} = {value!r:.80}: {only.why}")
        is_known = name.startswith("_") or name in fields.known or name in EXTRAS
        if not is_known and value not in (None, False, [], {}, ""):
            raise UserError(
                f"{file}: {name} = {value!r:.80}: this version does not know the field, and without it the network "
                "may differ"
            )
