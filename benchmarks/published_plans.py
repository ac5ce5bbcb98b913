"""What the planner says of runs whose speed was published.

    python -m benchmarks.published_plans

Prints the table of ``docs/plan.md``. Needs neither torch nor a GPU. Models are written in the terms
of a recipe; where a published run did something that a recipe cannot say, ``note`` says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from megatron_curr.plan.activations import MicroBatch
from megatron_curr.plan.cluster import Cluster, find_gpu
from megatron_curr.plan.flops import model_flops_per_token
from megatron_curr.plan.layout import axes_of, padded_vocab_size, pipeline_stages
from megatron_curr.plan.memory import stage_memory
from megatron_curr.plan.step_time import step_time
from megatron_curr.plan.video_flops import sample_flops as sample_flops_of_video
from megatron_curr.recipe.model import Model
from megatron_curr.recipe.parallel import Parallel
from megatron_curr.recipe.video_model import VideoDiT

_GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Run:
    """A published run."""

    name: str
    model: Model | VideoDiT
    gpu: str
    num_gpus: int
    batch_samples: int
    seq_length: int
    published_mfu: float
    parallel: dict[str, Any] = field(default_factory=dict)
    samples: int = 1  # of a micro-batch
    counts_masked_scores: bool = False  # the published figure does, as PaLM's convention


def gpt(num_layers: int, hidden_size: int, heads: int, vocab_size: int = 51_200) -> Model:
    """GPT-3's architecture, as Megatron's papers train it."""
    return Model.model_validate(
        {
            "num_layers": num_layers,
            "hidden_size": hidden_size,
            "ffn_hidden_size": 4 * hidden_size,
            "num_attention_heads": heads,
            "vocab_size": vocab_size,
            "max_position_embeddings": 2048,
            "activation": "gelu",
            "normalization": "LayerNorm",
            "linear_biases": "all",
            "untie_embeddings_and_output_weights": False,
        }
    )


def llama3_405b() -> Model:
    """With 128 layers for its 126, which its stages share out unevenly."""
    return Model.model_validate(
        {
            "preset": "llama3_70b",
            "num_layers": 128,
            "hidden_size": 16_384,
            "ffn_hidden_size": 53_248,
            "num_attention_heads": 128,
            "max_position_embeddings": 131_072,
        }
    )


def wan_14b() -> VideoDiT:
    """Wan 2.1's 14B: attention to 512 text tokens in every layer, 16 latent channels."""
    return VideoDiT.model_validate(
        {
            "num_layers": 40,
            "hidden_size": 5120,
            "ffn_hidden_size": 13_824,
            "num_attention_heads": 40,
            "kv_channels": 126,  # for 128: ours rotates three axes
            "in_channels": 16,
            "out_channels": 16,
            "max_text_tokens": 512,
        }
    )


SELECTIVE = {"recompute_granularity": "selective"}
FULL = {"recompute_granularity": "full"}


def split(tensor: int, pipeline: int = 1, chunks: int | None = None, **more: Any) -> dict[str, Any]:
    """A layout."""
    return {
        "tensor_model_parallel_size": tensor,
        "sequence_parallel": tensor > 1,
        "pipeline_model_parallel_size": pipeline,
        "virtual_pipeline_model_parallel_size": chunks,
        **more,
    }


SHARED = {
    "use_distributed_optimizer": True,
    "overlap_grad_reduce": True,
    "overlap_param_gather": True,
}


def runs() -> Iterator[Run]:
    """Every row of the table, in its order."""
    yield from llama_runs()
    yield from gpt_runs()
    yield Run(
        name="Wan 2.1 14B, video",
        model=wan_14b(),
        gpu="h100-80gb",
        num_gpus=128,
        batch_samples=128,
        seq_length=37_440,
        published_mfu=325.77 / 989,
        parallel=split(2, context_parallel_size=4, **FULL, **SHARED),
    )


def llama_runs() -> Iterator[Run]:
    """Llama 3 405B's three phases."""
    llama = {"gpu": "h100-80gb", "model": llama3_405b()}
    yield Run(
        name="Llama 3 405B, 8k",
        **llama,
        num_gpus=8192,
        batch_samples=2048,
        seq_length=8192,
        published_mfu=0.43,
        parallel=split(8, 16, 8, **SHARED),
    )
    yield Run(
        name="Llama 3 405B, 8k",
        **llama,
        num_gpus=16_384,
        batch_samples=2048,
        seq_length=8192,
        published_mfu=0.41,
        parallel=split(8, 16, 8, **SHARED),
    )
    yield Run(
        name="Llama 3 405B, 128k",
        **llama,
        num_gpus=16_384,
        batch_samples=128,
        seq_length=131_072,
        published_mfu=0.38,
        parallel=split(
            8,
            16,
            8,
            context_parallel_size=16,
            context_parallel_exchange="all_gather",
            **SHARED,
        ),
    )


def gpt_runs() -> Iterator[Run]:
    """GPT-3 and its like on A100s."""
    a100 = {"gpu": "a100-80gb", "seq_length": 2048, "counts_masked_scores": True}
    for name, model, num_gpus, batch, layout, samples, mfu in (
        ("GPT 22B", gpt(48, 6144, 64), 8, 4, split(8, **SELECTIVE), 4, 0.415),
        ("GPT-3 175B", gpt(96, 12_288, 96), 64, 64, split(8, 8, 3, **SELECTIVE), 1, 0.514),
        ("MT-NLG 530B", gpt(105, 20_480, 128), 280, 280, split(8, 35, 3, **SELECTIVE), 1, 0.56),
        ("GPT 1T", gpt(128, 25_600, 160), 512, 512, split(8, 64, **SELECTIVE), 1, 0.563),
    ):
        yield Run(
            name=name,
            model=model,
            num_gpus=num_gpus,
            batch_samples=batch,
            parallel=layout,
            samples=samples,
            published_mfu=mfu,
            **a100,
        )
    yield Run(
        name="GPT 175B, MegaScale",
        model=gpt(96, 12_288, 96, 64_000),
        num_gpus=12_288,
        batch_samples=6144,
        published_mfu=0.552,
        parallel=split(8, 8, 6, **SELECTIVE, **SHARED),
        **a100,
    )


def main() -> None:
    """Print the table, in Markdown."""
    print("| run | GPUs | layout | GiB a rank | predicted step | MFU predicted | MFU published |")
    print("|---|---|---|---:|---:|---:|---:|")
    for run in runs():
        print(row(run))


def row(run: Run) -> str:
    """One line of the table."""
    parallel = Parallel(micro_batch_tokens=run.samples * run.seq_length, **run.parallel)
    model = run.model
    is_text = isinstance(model, Model)
    vocab_size = 0
    if isinstance(model, Model):
        assert model.vocab_size is not None
        vocab_size = padded_vocab_size(model.vocab_size, model, parallel)
    batch = MicroBatch(
        model=model,
        parallel=parallel,
        vocab_size=vocab_size,
        num_samples=run.samples,
        seq_length=run.seq_length,
        precision="bf16",
        is_fused=True,
        isolate_documents=False,
    )
    cluster = Cluster(num_nodes=-(-run.num_gpus // 8), gpus_per_node=8, gpu=find_gpu(run.gpu))
    axes = axes_of(parallel, run.num_gpus)
    stages = pipeline_stages(model.num_layers, parallel)
    rounds = run.batch_samples // (axes.data.size * run.samples)
    step = step_time(
        batch,
        stages,
        axes=axes,
        cluster=cluster,
        num_micro_batches=rounds,
        keys_per_token=None if is_text else run.seq_length,
    )
    most = max(
        stage_memory(batch, stage, axes=axes, num_micro_batches=rounds).total for stage in stages
    )
    flops = run.batch_samples * sample_flops(run, vocab_size)
    mfu = flops / (step.total_s * run.num_gpus * cluster.gpu.peak_flops)
    layout = f"TP {axes.tensor.size}"
    for name, axis in (("PP", axes.pipeline), ("CP", axes.context)):
        layout += f", {name} {axis.size}" if axis.size > 1 else ""
    chunks = parallel.virtual_pipeline_model_parallel_size
    layout += f", {chunks} chunks" if chunks else ""
    again = parallel.recompute_granularity
    layout += f", recompute {'attention' if again == 'selective' else 'all'}" if again else ""
    gpus = f"{run.num_gpus:,} {run.gpu[:4].upper()}"
    return (
        f"| {run.name} | {gpus} | {layout} | {most / _GIB:.0f} | {step.total_s:.3g} s "
        f"| {mfu:.1%} | {run.published_mfu:.1%} |"
    )


def sample_flops(run: Run, vocab_size: int) -> float:
    """Of one sample, as the published figure counts them."""
    if isinstance(run.model, Model):
        keys = run.seq_length if run.counts_masked_scores else None
        return run.seq_length * model_flops_per_token(
            run.model, vocab_size=vocab_size, seq_length=run.seq_length, keys_per_token=keys
        )
    return sample_flops_of_video(
        run.model, num_patches=run.seq_length, text_tokens=run.model.max_text_tokens
    )


if __name__ == "__main__":
    main()
