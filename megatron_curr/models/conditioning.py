"""From timestep, frame rate and text to what the layers of the video transformer are told.

Small next to the layers, so every tensor rank and every pipeline stage holds these modules whole
and works them out for itself; only hidden states travel. ``mark_replicas`` has the gradients of
the copies summed, once.

Legend: B micro-batch, L text tokens, E width of the text encoder, D hidden size, R the two rows of
``modulation.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from megatron_curr.models.modulation import sinusoids

if TYPE_CHECKING:
    from megatron_curr.recipe.video_model import VideoDiT


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """What every layer of one forward pass is told. The first two carry gradients."""

    modulation_RB6D: Tensor
    text_LBD: Tensor
    text_mask_B11L: Tensor
    """False at the padding of a sample's text."""
    noised_SB: Tensor
    """Which row a token takes, of the tokens this rank holds between the matrices."""
    rotation: Tensor
    """Of this context rank's tokens (``rope3d.rotation_table``)."""
    num_tokens: int
    """Of the whole sequence, without its padding."""


def empty_linear(inputs: int, outputs: int, config: TransformerConfig) -> nn.Linear:
    """A linear layer whose weights ``models/weights.py`` fills in."""
    return torch.nn.utils.skip_init(
        nn.Linear,
        inputs,
        outputs,
        device=torch.cuda.current_device(),
        dtype=config.params_dtype,
    )


class ScalarEmbedder(nn.Module):
    """A number of a sample as a vector: its sinusoids through two matrices.

    ``rounded``: the number is first rounded to the weights' dtype, as a model expects that was
    trained so. In bf16 that moves timesteps by up to 2 of 1000.
    """

    def __init__(self, config: TransformerConfig, num_frequencies: int, *, rounded: bool) -> None:
        super().__init__()
        self.num_frequencies, self.rounded = num_frequencies, rounded
        self.mlp = nn.Sequential(
            empty_linear(num_frequencies, config.hidden_size, config),
            nn.SiLU(),
            empty_linear(config.hidden_size, config.hidden_size, config),
        )

    def forward(self, values_B: Tensor) -> Tensor:
        """[B, D] of the values."""
        dtype = self.mlp[0].weight.dtype
        values_B = values_B.to(dtype) if self.rounded else values_B
        return self.mlp(sinusoids(values_B, self.num_frequencies).to(dtype))


class TextEmbedder(nn.Module):
    """The text encoder's features at the model's width; normed before and after, without weights.

    MUG-V's training code norms with an epsilon of 1e-5 here, its released model with that of all
    other norms: this one does as the release.
    """

    def __init__(self, config: TransformerConfig, text_hidden_size: int) -> None:
        super().__init__()
        self.eps = config.layernorm_epsilon
        self.proj = nn.ModuleDict(
            {
                "fc1": empty_linear(text_hidden_size, config.hidden_size, config),
                "fc2": empty_linear(config.hidden_size, config.hidden_size, config),
            }
        )

    def forward(self, text_LBE: Tensor) -> Tensor:
        """[L, B, D] of the text, token by token."""
        x = self._norm(text_LBE.to(self.proj["fc1"].weight.dtype))
        x = nn.functional.gelu(self.proj["fc1"](x), approximate="tanh")
        return self._norm(self.proj["fc2"](x))

    def _norm(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, x.shape[-1:], eps=self.eps)


def conditioning_modules(model: VideoDiT, config: TransformerConfig) -> dict[str, nn.Module]:
    """The modules that every pipeline stage holds, by their names in the model."""
    width = config.hidden_size
    scalar_embedder = partial(
        ScalarEmbedder, config, model.timestep_frequencies, rounded=model.round_timesteps
    )
    return {
        "timestep_embedder": scalar_embedder(),
        "fps_embedder": scalar_embedder(),
        "timestep_block": nn.Sequential(nn.SiLU(), empty_linear(width, 6 * width, config)),
        "context_embedder": TextEmbedder(config, model.text_hidden_size),
    }


def mark_replicas(
    modules: dict[str, nn.Module], config: TransformerConfig, *, is_first_stage: bool
) -> None:
    """Mark the parameters of ``conditioning_modules`` so that their copies stay one model.

    * Under sequence parallelism each tensor rank's layers use the numbers of timestep and frame
      rate for its own tokens: the gradients are parts of a sum. Those of the text are whole, since
      the matrices that read it sum over the tensor ranks (``dit_layer.py``).
    * Each pipeline stage's layers give a part of a sum too, which megatron-core makes for
      parameters marked ``pipeline_parallel`` (where ``config.has_cond_embedder``).
    * That sum comes after the distributed optimizer has cut gradients into shards. A bucket of its
      own (``shared_embedding``) cuts a parameter the same way in every stage; in a common bucket
      the stages would add shards that do not match.
    * The gradient norm counts one copy: all but the first stage's are ``shared``.
    """
    for name, module in modules.items():
        for parameter in module.parameters():
            parameter.sequence_parallel = config.sequence_parallel and name != "context_embedder"
            if config.pipeline_model_parallel_size > 1:
                parameter.pipeline_parallel = True
                parameter.shared_embedding = True
                parameter.shared = not is_first_stage
