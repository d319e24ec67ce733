"""Models that nobody here wrote, in tiny random configurations: module, positional arguments, keyword arguments."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Example = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


def llama(hidden: int, heads: int, tokens: int, batch: int) -> Example:
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2, num_attention_heads=heads,
        num_key_value_heads=heads // 2, vocab_size=100, attn_implementation="sdpa",
    )  # fmt: skip
    return LlamaModel(config), (torch.randint(0, 100, (batch, tokens)),), {"use_cache": False}


def llama_block(hidden: int, heads: int, tokens: int, batch: int) -> Example:
    model: Any = llama(hidden, heads, tokens, batch)[0]
    h = torch.randn(batch, tokens, hidden)
    table = model.rotary_emb(h, torch.arange(tokens)[None])
    return model.layers[0], (h,), {"position_embeddings": table}


def wan(hidden: int, heads: int, tokens: int, batch: int) -> Example:
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=heads, attention_head_dim=hidden // heads, in_channels=4,
        out_channels=4, text_dim=16, freq_dim=32, ffn_dim=2 * hidden, num_layers=2, rope_max_seq_len=64,
    )  # fmt: skip
    side = 2 * round((tokens / 3) ** 0.5)
    video, text = torch.randn(batch, 4, 3, side, side), torch.randn(batch, 7, 16)
    return model, (video, torch.randint(0, 1000, (batch,)), text), {}


def ltx(hidden: int, heads: int, tokens: int, batch: int) -> Example:
    from diffusers import LTXVideoTransformer3DModel

    model = LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=heads, attention_head_dim=hidden // heads,
        cross_attention_dim=hidden, num_layers=2, caption_channels=16,
    )  # fmt: skip
    side = round((tokens / 3) ** 0.5)
    inputs = (torch.randn(batch, 3 * side * side, 8), torch.randn(batch, 7, 16), torch.rand(batch) * 1000)
    mask = torch.ones(batch, 7, dtype=torch.int64)
    sizes = {"num_frames": 3, "height": side, "width": side, "rope_interpolation_scale": (1.0, 32.0, 32.0)}
    return model, (*inputs, mask), sizes


def ltx2(hidden: int, heads: int, tokens: int, batch: int) -> Example:
    from diffusers import LTX2VideoTransformer3DModel

    model = LTX2VideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=heads, attention_head_dim=hidden // heads,
        cross_attention_dim=hidden, audio_in_channels=6, audio_out_channels=6, audio_num_attention_heads=heads,
        audio_attention_head_dim=hidden // heads // 2, audio_cross_attention_dim=hidden // 2, num_layers=2,
        caption_channels=16,
    )  # fmt: skip
    side = round((tokens / 3) ** 0.5)
    text, mask = torch.randn(batch, 7, 16), torch.ones(batch, 7)
    return model, (), {
        "hidden_states": torch.randn(batch, 3 * side * side, 8),
        "audio_hidden_states": torch.randn(batch, 5, 6),
        "encoder_hidden_states": text,
        "audio_encoder_hidden_states": text + 1,
        "encoder_attention_mask": mask,
        "audio_encoder_attention_mask": mask.clone(),
        "timestep": torch.rand(batch) * 1000,
        "num_frames": 3,
        "height": side,
        "width": side,
        "fps": 25.0,
        "audio_num_frames": 5,
    }  # fmt: skip


def vit(hidden: int, heads: int, tokens: int, batch: int) -> Example:
    from transformers import ViTConfig, ViTModel

    side = 8 * round(tokens**0.5)
    config = ViTConfig(
        hidden_size=hidden, num_hidden_layers=2, num_attention_heads=heads, intermediate_size=2 * hidden,
        image_size=side, patch_size=8,
    )  # fmt: skip
    return ViTModel(config), (torch.randn(batch, 3, side, side),), {}


def encoder_layer(hidden: int, heads: int, tokens: int, batch: int) -> Example:
    layer = nn.TransformerEncoderLayer(
        hidden, heads, 2 * hidden, batch_first=True, norm_first=True, activation="gelu"
    )  # fmt: skip
    return layer, (torch.randn(batch, tokens, hidden),), {}


FOREIGN: dict[str, Callable[[int, int, int, int], Example]] = {
    "llama": llama,
    "llama_block": llama_block,
    "wan": wan,
    "ltx": ltx,
    "ltx2": ltx2,
    "vit": vit,
    "encoder_layer": encoder_layer,
}


def example(
    name: str, dtype: torch.dtype = torch.float32, hidden: int = 64, heads: int = 4, tokens: int = 1200, batch: int = 2
) -> Example:
    """A model with all of its floats in `dtype`, ready to run; the same one every time."""
    torch.manual_seed(0)
    module, args, kwargs = FOREIGN[name](hidden, heads, tokens, batch)
    return module.eval().to(dtype), cast(args, dtype), cast(kwargs, dtype)


def cast(tree: Any, dtype: torch.dtype) -> Any:
    """Every floating-point tensor in a dtype."""
    return torch.utils._pytree.tree_map_only(Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, tree)


def tensors(output: Any) -> list[Tensor]:
    """All tensors of a result, whatever it is wrapped in."""
    if hasattr(output, "to_tuple"):
        output = output.to_tuple()
    return [x for x in torch.utils._pytree.tree_leaves(output) if isinstance(x, Tensor)]
