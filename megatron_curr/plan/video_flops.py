"""Arithmetic of a video diffusion transformer in closed form; see ``flops.py`` for what counts.

Tokens are not work: attention is full, so a clip's share of it grows with the square of its length
(for the 10B model 4 % at 1,024 tokens and two thirds at 50,400).
"""

from __future__ import annotations

from megatron_curr.plan.flops import BACKWARD
from megatron_curr.recipe.video_model import VideoDiT


def sample_flops(model: VideoDiT, *, num_patches: int, text_tokens: int) -> float:
    """FLOPs that training on one sample needs, forwards and backwards.

    Give the patches and text tokens with their padding for the work that is done, without it for
    the work that counts.
    """
    tokens = num_patches + 2  # start and end
    forward = model.num_layers * layer_flops(model, tokens=tokens, text_tokens=text_tokens)
    width = model.hidden_size
    patch_in = model.in_channels * model.patch_volume
    patch_out = model.out_channels * model.patch_volume
    forward += 2 * num_patches * width * (patch_in + patch_out)
    forward += 2 * text_tokens * width * (model.text_hidden_size + width)
    # Two timesteps, of noised and of given frames, and one frame rate.
    forward += 3 * 2 * width * (model.timestep_frequencies + width)
    forward += 2 * 2 * width * 6 * width
    return (1 + BACKWARD) * forward


def layer_flops(model: VideoDiT, *, tokens: int, text_tokens: int) -> float:
    """Forward FLOPs of one sample in one layer."""
    width, heads_width = model.hidden_size, model.num_attention_heads * model.kv_channels
    projections = 2 * tokens * width * heads_width * 4  # query, key, value, output
    scores = 2 * 2 * tokens * tokens * heads_width
    cross_projections = 2 * width * heads_width * (2 * tokens + 2 * text_tokens)
    cross_scores = 2 * 2 * tokens * text_tokens * heads_width
    mlp = 2 * 2 * tokens * width * model.ffn_hidden_size
    return projections + scores + cross_projections + cross_scores + mlp
