"""Every family, both directions, on every layout, against transformers' own random models."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_curr.convert.hf_config import read_config, write_config
from megatron_curr.convert.import_model import import_model
from megatron_curr.convert.published import read_safetensors
from megatron_curr.convert.safetensors_out import write_safetensors
from megatron_curr.convert.source import Source, check_stored, open_source
from megatron_curr.convert.stored import METADATA, open_stored
from tests.convert.toy_models import NUM_TOKENS, SPARSE, TOYS, VOCAB_SIZE, save_toy, toy_tokens
from tests.ranks import run_ranks

# By the number of ranks: (tensor, pipeline, expert).
LAYOUTS = {
    1: ((1, 1, 1),),
    2: ((2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 1, 2)),
    4: ((2, 2, 1), (1, 2, 2), (2, 2, 2)),
}
# Their settings meet no layout: one rank is enough.
ON_ONE_RANK = {
    *("gpt_neox_in_turn", "qwen3_moe_unnormed", "deepseek_v3_plain_rope"),
    *("olmo3", "internlm3", "glm"),
}


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Published toys under ``<name>/hf``, checkpoints of them, and their logits."""
    folder = tmp_path_factory.mktemp("toys")
    for name in TOYS:
        logits = save_toy(name, folder / name / "hf")
        torch.save(logits, folder / name / "logits.pt")
        import_model(open_source(folder / name / "hf"), folder / name / "checkpoint")
    return folder


def every_layout_is_the_published_model(rank: int, folder: str) -> None:
    from megatron_curr.convert.load import load_weights
    from megatron_curr.convert.verify import load_stored
    from megatron_curr.parallel.groups import build_groups, destroy_groups
    from tests.parallel.layouts import layout

    worst: dict[str, float] = {}
    for tp, pp, ep in LAYOUTS[dist.get_world_size()]:
        parallel = layout(tp=tp, pp=pp, ep=ep, etp=1, sequence_parallel=tp > 1)
        groups = build_groups(parallel)
        for name in toys_of(ep=ep, is_alone=dist.get_world_size() == 1):
            home = Path(folder) / name
            source, expected = open_source(home / "hf"), torch.load(home / "logits.pt")
            gpt = build_toy(source, parallel, groups)
            # A checkpoint, read by megatron-core, or the published files, by us.
            if (tp, pp, ep) in ((1, 1, 1), (2, 2, 2)):
                load_stored(gpt, home / "checkpoint")
            else:
                load_weights([gpt], source, groups=groups, vocab_size=VOCAB_SIZE)
            logits = whole_logits(gpt, groups)
            if logits is not None:
                error = (logits[..., :VOCAB_SIZE] - expected).abs().max().item()
                worst[name] = max(worst.get(name, 0.0), error)
            stored = home / f"tp{tp}_pp{pp}_ep{ep}"
            save_boxes(gpt, groups, stored)
            if rank == 0:
                is_bit_exact(stored, source, home / "hf")
            dist.barrier()
        destroy_groups()
    assert all(error < 1e-5 for error in worst.values()), worst


def toys_of(*, ep: int, is_alone: bool) -> list[str]:
    """Those with experts where there are expert ranks."""
    return sorted((SPARSE if ep > 1 else TOYS.keys()) - (set() if is_alone else ON_ONE_RANK))


def build_toy(source: Source, parallel, groups):
    from megatron_curr.models.gpt import build_gpt

    return build_gpt(
        source.model,
        parallel=parallel,
        precision="fp32",
        groups=groups,
        vocab_size=source.vocab_size,
        isolate_documents=False,
        seed=None,
    ).eval()


@torch.no_grad()
def whole_logits(gpt, groups) -> Tensor | None:
    """[B, S, V padded] on the last stage's ranks."""
    tokens_BS = toy_tokens()
    peers = dist.get_process_group_ranks(groups.pg_collection.pp)
    length = NUM_TOKENS // groups.tp_size
    if groups.pp_rank > 0:
        received = torch.empty(length, len(tokens_BS), gpt.config.hidden_size)
        dist.recv(received, peers[groups.pp_rank - 1])
        gpt.set_input_tensor(received)
    out = gpt(tokens_BS, torch.arange(NUM_TOKENS)[None], None)
    if groups.pp_rank < groups.pp_size - 1:
        dist.send(out.contiguous(), peers[groups.pp_rank + 1])
        return None
    parts = [torch.empty_like(out) for _ in range(groups.tp_size)]
    dist.all_gather(parts, out.contiguous(), group=groups.pg_collection.tp)
    return torch.cat(parts, dim=-1)


def save_boxes(gpt, groups, folder: Path) -> None:
    """A checkpoint cut as megatron-core cuts this layout's, without its slow writer."""
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import apply_factories, is_main_replica
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    state = gpt.sharded_state_dict(metadata={"dp_cp_group": groups.pg_collection.dp_cp})
    apply_factories(state)
    folder.mkdir(exist_ok=True)
    mine = []
    with (folder / f"__{groups.rank}_0.distcp").open("wb") as file:
        for box in nested_values(state):
            if isinstance(box, ShardedTensor) and is_main_replica(box.replica_id):
                lead = (1,) * box.prepend_axis_num
                start, size = file.tell(), (*lead, *box.data.shape)
                torch.save(box.data.detach().clone().view(size), file)
                place = _StorageInfo(Path(file.name).name, start, file.tell() - start)
                mine.append((box.key, box.global_offset, size, box.global_shape, place))
    every: list = [None] * groups.world_size
    dist.all_gather_object(every, mine)
    if groups.rank == 0:
        tensors: dict[str, TensorStorageMetadata] = {}
        places = {}
        for key, offset, size, whole, place in (box for share in every for box in share):
            fresh = TensorStorageMetadata(TensorProperties(torch.float32), torch.Size(whole), [])
            tensors.setdefault(key, fresh).chunks.append(
                ChunkStorageMetadata(torch.Size(offset), torch.Size(size))
            )
            places[MetadataIndex(key, offset)] = place
        (folder / METADATA).write_bytes(pickle.dumps(Metadata(tensors, storage_data=places)))


def is_bit_exact(checkpoint: Path, source: Source, hf: Path) -> None:
    family = source.family()
    pieces = tuple(family.pieces(source.model, vocab_size=VOCAB_SIZE))
    stored = open_stored(checkpoint)
    check_stored(stored, pieces, source.model)
    write_safetensors(stored, pieces, checkpoint, dtype=None, max_file_bytes=10**9)
    ours = read_safetensors(checkpoint / "model.safetensors")
    theirs = read_safetensors(hf / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), (checkpoint, name)


@pytest.mark.parametrize("num_ranks", LAYOUTS)
def test_logits_and_round_trips_on_every_layout(toys: Path, num_ranks: int) -> None:
    run_ranks(every_layout_is_the_published_model, num_ranks, str(toys), timeout_s=300)


@pytest.mark.parametrize("name", [name for name in TOYS if name != "telechat2"])
def test_configs_come_back_as_transformers_reads_them(
    toys: Path, tmp_path: Path, name: str
) -> None:
    from transformers import AutoConfig

    source = open_source(toys / name / "hf")
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    fields = write_config(
        source.model, source.family(), vocab_size=VOCAB_SIZE, token_ids=ids, dtype="float32"
    )
    rope = fields["rope_parameters"]
    assert {"rope_theta": fields["rope_theta"]}.items() <= rope.get("full_attention", rope).items()
    (tmp_path / "config.json").write_text(json.dumps(fields))
    ours, theirs = (
        AutoConfig.from_pretrained(folder).to_dict() for folder in (tmp_path, toys / name / "hf")
    )
    passing = {"transformers_version", "_name_or_path", "rope_theta", "rope_scaling", "head_dim"}
    passing |= {"torch_dtype", "rotary_pct", "rotary_emb_base", "pretraining_tp", "layer_types"}
    passing |= {"partial_rotary_factor", "num_mtp_layers", "num_nextn_predict_layers"}
    passing |= {"model_type", "pad_token_id", "intermediate_size", "num_key_value_heads"}
    passing |= {"no_rope_layer_interval", "max_window_layers"}
    if name == "falcon_7b":  # written as the newer decoder, which can say the same
        passing |= {"new_decoder_architecture", "num_kv_heads", "num_ln_in_parallel_attn"}
    for field, value in theirs.items():
        if field not in passing and value is not None:
            assert ours[field] == value, field
    # Read as version 4 writes it, it is the same model.
    del fields["rope_parameters"], fields["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    again = source.family().settings(read_config(tmp_path))
    first = source.family().settings(read_config(toys / name / "hf"))
    assert {**first, "kv_channels": None} == {**again, "kv_channels": None}
