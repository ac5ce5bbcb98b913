"""MUG-V's video diffusion transformer on megatron-core: latents, text and timestep to a velocity.

Every pipeline stage is given the same micro-batch and works the conditioning out for itself; only
hidden states travel. A rank predicts the patches it holds (``patches.py``), so that the loss is
summed over context ranks like any other; tensor ranks hold equal copies of the prediction.

Legend: B micro-batch, C latent channels, T latent frames, Y rows, X columns, L text tokens, E width
of the text encoder, S places of the sequence that a context rank holds, D hidden size, K numbers
of one patch, R the two rows of ``modulation.py``.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.enums import ModelType
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import (
    TransformerBlock,
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.utils import make_viewless_tensor
from torch import Tensor, nn

from megatron_curr.models.backend import choose_backend
from megatron_curr.models.conditioning import (
    Conditions,
    conditioning_modules,
    empty_linear,
    mark_replicas,
)
from megatron_curr.models.dit_layer import video_layer_spec
from megatron_curr.models.layout_settings import layout_settings
from megatron_curr.models.modulation import ScaleShiftTable, modulated_norm
from megatron_curr.models.norms import upcast
from megatron_curr.models.patches import Grid, held_positions, local_frame_mask, local_patches
from megatron_curr.models.rope3d import rotation_table
from megatron_curr.models.weights import initialise_weights, matrix_spread
from megatron_curr.parallel.groups import Groups

if TYPE_CHECKING:
    from megatron_curr.recipe.parallel import Parallel
    from megatron_curr.recipe.video_model import VideoDiT as Model


def video_transformer_config(
    model: Model, *, parallel: Parallel, precision: str
) -> TransformerConfig:
    """megatron-core's configuration of the layers; ``precision`` is ``fp32`` or ``bf16``."""
    settings = layout_settings(model, parallel=parallel, precision=precision)
    settings |= {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.num_query_groups,
        "kv_channels": model.kv_channels,
        "normalization": "RMSNorm",
        "layernorm_epsilon": model.layernorm_epsilon,
        "qk_layernorm": True,
        "add_bias_linear": True,
        "gated_linear_unit": False,
        # megatron-core's own is the exact GELU, or the tanh one where it is fused with the bias.
        "activation_func": partial(nn.functional.gelu, approximate="tanh"),
        "bias_activation_fusion": False,
        "apply_rope_fusion": False,
        # Micro-batches differ in length; stages tell each other how long one is.
        "variable_seq_lengths": parallel.pipeline_model_parallel_size > 1,
        "moe_token_dispatcher_type": "alltoall",  # asked for then, of models without experts too
    }
    config = TransformerConfig(**settings)
    config.has_cond_embedder = True
    return config


class PatchEmbedder(nn.Module):
    """Patches at the model's width; the weight is kept as the convolution's that it is."""

    def __init__(self, config: TransformerConfig, model: Model) -> None:
        super().__init__()
        self.proj = torch.nn.utils.skip_init(
            nn.Conv3d,
            model.in_channels,
            config.hidden_size,
            tuple(model.patch),
            stride=tuple(model.patch),
            device=torch.cuda.current_device(),
            dtype=config.params_dtype,
        )

    def forward(self, patches_SBK: Tensor) -> Tensor:
        """[S, B, D] of patches whose numbers are ordered frame, row, column, channel."""
        weight_DK = self.proj.weight.permute(0, 2, 3, 4, 1).flatten(1)
        return nn.functional.linear(patches_SBK.to(weight_DK.dtype), weight_DK, self.proj.bias)


class FinalLayer(nn.Module):
    """The prediction of each token's patch.

    Modulated by the timestep's embedding itself, where the layers take what ``timestep_block``
    makes of it.
    """

    def __init__(self, config: TransformerConfig, model: Model) -> None:
        super().__init__()
        self.eps = config.layernorm_epsilon
        self.scale_shift_table = ScaleShiftTable(config, 2)
        num_outputs = model.patch_volume * model.out_channels
        self.linear = empty_linear(config.hidden_size, num_outputs, config)

    def forward(self, hidden_SBD: Tensor, embedding_RBD: Tensor, noised_SB: Tensor) -> Tensor:
        """[S, B, K]."""
        shift_RBD, scale_RBD = self.scale_shift_table(embedding_RBD[:, :, None])
        return self.linear(
            modulated_norm(
                hidden_SBD,
                shift_RBD=shift_RBD,
                scale_RBD=scale_RBD,
                noised_SB=noised_SB,
                eps=self.eps,
            )
        )


class VideoBlock(TransformerBlock):
    """This stage's layers; megatron-core's block, given conditions in place of a mask."""

    def forward(self, hidden_SBD: Tensor | None, conditions: Conditions) -> Tensor:
        """[S, B, D]; stages after the first take their input from ``set_input_tensor``."""
        hidden = hidden_SBD if self.pre_process else self.input_tensor
        hidden = make_viewless_tensor(inp=hidden, requires_grad=True, keep_graph=True)
        num_layers = len(self.layers)
        if self.config.recompute_granularity != "full" or not self.training:
            return self._run(slice(None), conditions, hidden, *_differentiable(conditions))
        unit, kept_from = self.config.recompute_num_layers, num_layers
        if self.config.recompute_method == "block":
            unit, kept_from = 1, min(unit, num_layers)
        for first in range(0, kept_from, unit):
            hidden = tensor_parallel.checkpoint(
                partial(self._run, slice(first, first + unit), conditions),
                self.config.distribute_saved_activations,
                hidden,
                *_differentiable(conditions),
            )
        return self._run(slice(kept_from, None), conditions, hidden, *_differentiable(conditions))

    def _run(
        self,
        layers: slice,
        conditions: Conditions,
        hidden_SBD: Tensor,
        modulation_RB6D: Tensor,
        text_LBD: Tensor,
    ) -> Tensor:
        """Some of the layers; whatever carries gradients is an argument, as recompute needs."""
        conditions = replace(conditions, modulation_RB6D=modulation_RB6D, text_LBD=text_LBD)
        for layer in self.layers[layers]:
            hidden_SBD = layer(hidden_SBD, conditions)
        return hidden_SBD


def _differentiable(conditions: Conditions) -> tuple[Tensor, Tensor]:
    return conditions.modulation_RB6D, conditions.text_LBD


class VideoDiT(MegatronModule):
    """One pipeline stage of the model."""

    # Asked for by megatron-core of every model.
    share_embeddings_and_output_weights = False
    model_type = ModelType.encoder_or_decoder

    def __init__(self, model: Model, config: TransformerConfig, groups: Groups) -> None:
        super().__init__(config=config)
        self.model, self.groups = model, groups
        self.pre_process = groups.pp_rank == 0
        self.post_process = groups.pp_rank == groups.pp_size - 1
        if self.pre_process:
            self._add_input(model, config)
        replicas = conditioning_modules(model, config)
        mark_replicas(replicas, config, is_first_stage=self.pre_process)
        self.replica_names = tuple(replicas)
        for name, module in replicas.items():
            self.add_module(name, module)
        spec = video_layer_spec(choose_backend(isolate_documents=True))
        num_layers = get_num_layers_to_build(config, pp_rank=groups.pp_rank)
        self.decoder = VideoBlock(
            config,
            TransformerBlockSubmodules(layer_specs=[spec] * num_layers, layer_norm=None),
            post_layer_norm=False,
            pre_process=self.pre_process,
            post_process=self.post_process,
            pg_collection=groups.pg_collection,
        )
        if self.post_process:
            self.final_layer = FinalLayer(config, model)
            _mark_parts(self.final_layer, config)

    def _add_input(self, model: Model, config: TransformerConfig) -> None:
        self.x_embedder = PatchEmbedder(config, model)
        empty = partial(torch.empty, config.hidden_size, dtype=config.params_dtype)
        for name in ("start_token", "end_token"):
            parameter = nn.Parameter(empty(device=torch.cuda.current_device()))
            parameter.sequence_parallel = config.sequence_parallel
            self.register_parameter(name, parameter)
        _mark_parts(self.x_embedder, config)

    def set_input_tensor(self, input_tensor: list[Tensor]) -> None:
        """Take the hidden states of the stage before; called by megatron-core's schedules."""
        (hidden_SBD,) = input_tensor if isinstance(input_tensor, list) else [input_tensor]
        self.decoder.set_input_tensor(hidden_SBD)

    def forward(
        self,
        latents_BCTYX: Tensor,
        text_BLE: Tensor,
        text_lengths_B: Tensor,
        timesteps_B: Tensor,
        fps_B: Tensor,
        frame_mask_BT: Tensor,
    ) -> Tensor:
        """What this context rank's patches move by, [B, S, K] in fp32; else hidden states.

        ``timesteps_B`` are floats from 0, clean, to 1000, noise. ``frame_mask_BT`` is True for
        frames with noise; the others are taken as given, at timestep 0. The whole micro-batch is
        given to every rank of a model. Places without a patch hold numbers without meaning;
        ``local_patches`` and ``local_frame_mask`` lay targets and masks out alike, and the channels
        of K come last.
        """
        grid = Grid.of(latents_BCTYX.shape, self.model.patch)
        held_S = held_positions(grid, self.groups)
        frame_mask_BS = local_frame_mask(frame_mask_BT, grid=grid, groups=self.groups)
        embedding_RBD = self.timestep_embedder(
            torch.cat([timesteps_B, torch.zeros_like(timesteps_B)])
        ).unflatten(0, (2, -1)) + self.fps_embedder(fps_B)
        text_places_L = torch.arange(text_BLE.shape[1], device=text_lengths_B.device)
        conditions = Conditions(
            modulation_RB6D=self.timestep_block(embedding_RBD).unflatten(-1, (6, -1)),
            text_LBD=self.context_embedder(text_BLE.transpose(0, 1)),
            text_mask_B11L=(text_places_L < text_lengths_B[:, None])[:, None, None],
            noised_SB=self._own(frame_mask_BS.transpose(0, 1)),
            rotation=rotation_table(
                grid,
                held_S,
                head_dim=self.model.kv_channels,
                base=self.model.rotary_base,
                dtype=upcast(embedding_RBD).dtype,
            ),
            num_tokens=grid.num_tokens,
        )
        hidden_SBD = self._embed(latents_BCTYX, held_S, grid) if self.pre_process else None
        hidden_SBD = self.decoder(hidden_SBD, conditions)
        if not self.post_process:
            return hidden_SBD
        out_SBK = self.final_layer(hidden_SBD, embedding_RBD, conditions.noised_SB)
        if self.config.sequence_parallel:
            # The loss is worked out on every tensor rank alike: going back, each takes its own part
            # of the gradient, where the default would add up the copies.
            out_SBK = tensor_parallel.gather_from_sequence_parallel_region(
                out_SBK, tensor_parallel_output_grad=False, group=self.groups.pg_collection.tp
            )
        return upcast(out_SBK).transpose(0, 1)

    def _embed(self, latents_BCTYX: Tensor, held_S: Tensor, grid: Grid) -> Tensor:
        """Hidden states [S, B, D] of the tokens between the matrices; padding starts at zero."""
        patches_BSK = local_patches(latents_BCTYX, patch=self.model.patch, groups=self.groups)
        embedded_SBD = self.x_embedder(self._own(patches_BSK.transpose(0, 1)))
        place_S11 = self._own(held_S)[:, None, None]
        hidden_SBD = torch.where(place_S11 == 0, self.start_token, embedded_SBD)
        hidden_SBD = torch.where(place_S11 == grid.num_patches + 1, self.end_token, hidden_SBD)
        return hidden_SBD.masked_fill(place_S11 > grid.num_patches + 1, 0)

    def _own(self, of_places: Tensor) -> Tensor:
        """This tensor rank's part of the places that its context rank holds, along dim 0."""
        if not self.config.sequence_parallel:
            return of_places
        return of_places.chunk(self.groups.tp_size)[self.groups.tp_rank]

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The parameters for megatron-core's checkpoints; one stage's copy of replicas is kept."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        replicas = tuple(f"{prefix}{name}." for name in self.replica_names)
        for key, tensor in state.items():
            if isinstance(tensor, ShardedTensor) and key.startswith(replicas):
                tensor.replica_id = (self.groups.pp_rank, *tensor.replica_id[1:])
        return state


def _mark_parts(module: nn.Module, config: TransformerConfig) -> None:
    """Under sequence parallelism each tensor rank used the parameters for its own tokens."""
    for parameter in module.parameters():
        parameter.sequence_parallel = config.sequence_parallel


def build_video_dit_chunks(
    model: Model, *, parallel: Parallel, precision: str, groups: Groups, seed: int = 1234
) -> list[VideoDiT]:
    """This rank's stage, with first weights that depend on ``seed`` alone.

    A list, as megatron-core's schedules take chunks. There are no virtual stages: interleaved, two
    stages would mistake the lengths of one micro-batch for those of another.
    """
    config = video_transformer_config(model, parallel=parallel, precision=precision)
    assert config.virtual_pipeline_model_parallel_size is None, "recipes refuse it"
    chunk = VideoDiT(model, config, groups)
    initialise_weights(chunk, groups=groups, seed=seed, spread=partial(first_spread, model))
    return [chunk]


def first_spread(model: Model, name: str, parameter: Tensor) -> float | None:
    """Standard deviation of a parameter's first values; None for biases and norms.

    MUG-V's: tables 1/sqrt(D), start and end token 0.02, and for the matrices outside the layers the
    spread of torch's own start, so that gates are open from the first step. The layers' matrices
    start as a GPT's.
    """
    if name.endswith("scale_shift_table.bias"):
        return 1 / math.sqrt(model.hidden_size)
    if name in ("start_token", "end_token"):
        return 0.02
    if name.startswith("decoder.") or parameter.dim() == 1:
        return matrix_spread(
            name, parameter, std=model.init_method_std, num_layers=model.num_layers
        )
    return 1 / math.sqrt(3 * parameter[0].numel())
