"""The smallest VAEs, text encoders and tokenizers with random weights, of diffusers' and transformers' own classes."""

import json
import string
import tempfile
from pathlib import Path
from typing import Any

import diffusers

LENGTH = 16  # tokens of a prompt
WIDTH = 16  # of text encoders


def autoencoder(latent_channels: int = 4, num_halvings: int = 1, **options: Any) -> Any:
    """A VAE that halves each side, or does so several times."""
    return diffusers.AutoencoderKL(
        block_out_channels=(8,) * (num_halvings + 1),
        down_block_types=("DownEncoderBlock2D",) * (num_halvings + 1),
        up_block_types=("UpDecoderBlock2D",) * (num_halvings + 1),
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


def t5(kind: str = "T5") -> Any:
    """Of twice the width, to hold two CLIPs side by side.  kind: or "UMT5"."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(t5_tokens()),
        d_model=2 * WIDTH,
        d_kv=8,
        d_ff=2 * WIDTH,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return getattr(transformers, f"{kind}EncoderModel")(config)


def t5_tokenizer() -> Any:
    """T5's tokenizer with single letters for its vocabulary."""
    import transformers

    return transformers.T5Tokenizer(vocab=[(token, 0.0) for token in t5_tokens()], extra_ids=0)


def t5_tokens() -> list[str]:
    return ["<pad>", "</s>", "<unk>", "\u2581", *string.ascii_letters, *string.digits, *string.punctuation]


def gemma(num_layers: int = 1) -> Any:
    import transformers

    config = transformers.Gemma2Config(
        vocab_size=len(gemma_tokens()),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=num_layers,
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


def glm() -> Any:
    import transformers

    config = transformers.GlmConfig(
        vocab_size=len(glm_tokens()),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        pad_token_id=0,
        eos_token_id=[0],
    )
    return transformers.GlmModel(config)


def glm_tokenizer() -> Any:
    """With single letters for its vocabulary, two tokens before each prompt, and padding at the left, as GLM's."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tokens = glm_tokens()
    made = Tokenizer(models.WordLevel({token: number for number, token in enumerate(tokens)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    start = [(token, tokens.index(token)) for token in ("[gMASK]", "<sop>")]
    made.post_processor = processors.TemplateProcessing(single="[gMASK] <sop> $A", special_tokens=start)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<|endoftext|>", unk_token="<unk>", padding_side="left"
    )


def glm_tokens() -> list[str]:
    special = ["<|endoftext|>", "<unk>", "[gMASK]", "<sop>", " "]
    return [*special, *string.ascii_letters, *string.digits, *string.punctuation]


CHAT = """{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}{% if enable_thinking is false %}<think>

</think>

{% endif %}"""
"""As Qwen3's."""


def qwen3(name: str = "Qwen3Model", num_layers: int = 2) -> Any:
    """A Qwen3 of transformers' class `name`."""
    import transformers

    config = transformers.Qwen3Config(
        vocab_size=len(qwen_tokens()),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=num_layers,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=True,
    )
    return getattr(transformers, name)(config)


def qwen_vl() -> Any:
    import transformers

    special = dict.fromkeys(("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"), 1)
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(qwen_tokens()),
            "hidden_size": WIDTH,
            "intermediate_size": WIDTH,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": WIDTH,
            "fullatt_block_indexes": [0],
        },
        **special,
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def qwen_tokenizer() -> Any:
    """Qwen's tokenizer with single bytes for its vocabulary."""
    import transformers

    vocabulary = {token: number for number, token in enumerate(qwen_tokens())}
    special = ["<|im_start|>", "<|im_end|>"]
    tokenizer = transformers.Qwen2Tokenizer(vocab=vocabulary, merges=[], additional_special_tokens=special)
    tokenizer.chat_template = CHAT
    return tokenizer


def qwen_processor() -> Any:
    import transformers

    tokenizer, images = qwen_tokenizer(), transformers.Qwen2VLImageProcessor()
    tokenizer.add_tokens(["<|image_pad|>", "<|video_pad|>"])
    videos = transformers.Qwen2VLVideoProcessor()
    return transformers.Qwen2VLProcessor(images, tokenizer, videos, chat_template=tokenizer.chat_template)


def qwen_tokens() -> list[str]:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "\u0120", "\u010a"]  # a space, a new line
    return [*special, *string.ascii_letters, *string.digits, *string.punctuation]
