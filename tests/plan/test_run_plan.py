"""Plans of whole recipes, and the verb that prints them."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_curr.cli import main
from megatron_curr.data.shard_writer import ShardWriter
from megatron_curr.errors import RecipeError
from megatron_curr.plan.cluster import Cluster, find_gpu
from megatron_curr.plan.findings import Plan
from megatron_curr.plan.flops import keys_in_documents, model_flops_per_token
from megatron_curr.plan.run_plan import plan_run
from megatron_curr.recipe.load import load_recipe
from megatron_curr.recipe.schema import Recipe
from megatron_curr.recipe.shipped import shipped_recipe

ROOT = Path(__file__).parents[2]
KNOWN = {"web": 2_000_000_000_000, "code": 100_000_000_000}


def recipe_of(name: str, *overrides: str) -> Recipe:
    recipe = load_recipe(shipped_recipe(name), overrides)
    assert isinstance(recipe, Recipe)
    return recipe


def plan_of(*overrides: str, name: str = "llama3_70b.yaml", nodes: int = 64, **how: Any) -> Plan:
    cluster = Cluster(num_nodes=nodes, gpus_per_node=8, gpu=find_gpu("h100-80gb"))
    return plan_run(recipe_of(name, *overrides), cluster, **how)


def run_plan(*arguments: str) -> int:
    return main(["plan", *arguments])


@pytest.mark.parametrize(("name", "nodes"), [("llama3_8b.yaml", 8), ("llama3_70b.yaml", 64)])
def test_shipped_recipes_fit_the_cluster_in_their_head_comment(name: str, nodes: int) -> None:
    text = shipped_recipe(name).read_text()
    assert f"plan configs/{name} --nodes {nodes} --gpus-per-node 8 --gpu h100-80gb" in text
    assert plan_of(name=name, nodes=nodes).fits


def test_phases_add_up_to_the_schedule() -> None:
    plan = plan_of()
    main_phase, anneal = (phase.steps for phase in plan.phases)
    assert main_phase.first_batch_tokens == 4_194_304
    assert main_phase.last_batch_tokens == anneal.first_batch_tokens == 8_388_608
    assert main_phase.tokens + anneal.tokens == pytest.approx(2.1e12, rel=1e-5)
    assert anneal.steps == pytest.approx(100e9 / 8_388_608, abs=1)
    assert sum(anneal.tokens_by_source.values()) == anneal.tokens
    assert anneal.tokens_by_source["code"] == pytest.approx(50e9, rel=1e-5)


def test_a_stated_utilisation_sets_the_clock() -> None:
    plan = plan_of(mfu=0.4)
    flops = sum(phase.flops_per_token * phase.steps.tokens for phase in plan.phases)
    assert plan.mfu == pytest.approx(0.4)
    assert plan.hours * 3600 == pytest.approx(flops / (0.4 * 512 * 989e12))


def test_sources_read_too_often_are_warned_of_and_refused() -> None:
    plan = plan_of(source_tokens={"web": 2_000_000_000_000, "code": 81_000_000_000})
    read = 0.15 * 2e12 + 0.5 * 100e9
    assert plan.epochs["code"][-1] == pytest.approx(read / 81e9, rel=1e-4)
    assert not plan.fits
    assert "data.sources.code would be read 4.32 times" in plan.problems[0]
    assert "past its max_epochs of 4 in phase 'anneal'" in plan.problems[0]
    lenient = plan_of("data.sources.code.max_epochs=8", source_tokens={"code": 81_000_000_000})
    assert lenient.fits
    assert "read 4.32 times, 4 are passed in phase 'anneal'" in lenient.warnings[0]


def test_a_run_that_does_not_fit_gets_layouts_that_do() -> None:
    plan = plan_of("parallel.tensor_model_parallel_size=2", nodes=16)
    assert not plan.fits
    assert plan.problems[0].startswith("memory: a rank of pipeline stage 0 needs")
    assert plan.alternatives
    times = [found.step_s for found in plan.alternatives]
    assert times == sorted(times)
    for found in plan.alternatives:
        overrides = [*found.arguments]
        if not any("tensor_model_parallel_size" in change for change in overrides):
            overrides.append("parallel.tensor_model_parallel_size=2")
        again = plan_of(*overrides, nodes=16)
        assert again.fits
        assert again.peak_bytes == pytest.approx(found.peak_bytes)
        assert again.phases[-1].step.total_s == pytest.approx(found.step_s)


def test_recomputing_layers_trades_memory_for_time() -> None:
    kept, again = plan_of(), plan_of("parallel.recompute_granularity=full")
    assert again.memory[0].activations < kept.memory[0].activations / 8
    ratio = again.phases[-1].step.compute_s / kept.phases[-1].step.compute_s
    assert 1.3 < ratio <= 4 / 3
    assert again.phases[-1].flops_per_token == kept.phases[-1].flops_per_token


def test_a_ring_hides_behind_attention_no_longer_than_that_takes() -> None:
    recipe = recipe_of("llama3_8b.yaml", "parallel.context_parallel_size=16")

    def waits(network_gb_s: float) -> list[float]:
        gpu = find_gpu("h100-80gb", network_gb_s=network_gb_s)
        plan = plan_run(recipe, Cluster(num_nodes=8, gpus_per_node=8, gpu=gpu))
        return [phase.step.messages_s / phase.step.compute_s for phase in plan.phases]

    (short, long), (short_slow, long_slow) = waits(50), waits(5)
    assert long < short / 2  # attention grows with the sequence, the keys of a token do not
    assert short_slow > 5 * short and long_slow > 5 * long


def test_checkpoints_hold_weights_and_moments() -> None:
    checkpoints = plan_of().checkpoints
    assert checkpoints.bytes_each == 14 * 70_553_706_496
    assert (checkpoints.num_written, checkpoints.num_kept) == (210, 6)
    assert checkpoints.most_at_once == 7


def test_layout_that_the_gpus_cannot_hold_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(shipped_recipe("llama3_70b.yaml"))
    assert run_plan(recipe, "--nodes", "3", "--gpus-per-node", "8") == 2
    assert "24 ranks cannot hold tensor 8 x pipeline 4" in capsys.readouterr().err


def test_unknown_gpu_is_refused_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(shipped_recipe("llama3_8b.yaml"))
    assert run_plan(recipe, "--gpu", "h100-80g") == 2
    assert "did you mean 'h100-80gb'?" in capsys.readouterr().err
    with pytest.raises(RecipeError, match="describe it by --gpu-memory-gib and --peak-tflops"):
        find_gpu("tpu-v7", memory_gib=100)


def test_a_gpu_can_be_given_by_numbers() -> None:
    gpu = find_gpu("next", memory_gib=288, peak_tflops=2500, network_gb_s=100)
    assert (gpu.memory_bytes, gpu.peak_flops) == (288 * 2**30, 2.5e15)
    assert (gpu.network_bandwidth, gpu.nvlink_bandwidth) == (100e9, 64e9)
    assert find_gpu("h100-80gb", network_gb_s=25).network_bandwidth == 25e9


def test_exit_code_says_whether_it_fits(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(shipped_recipe("llama3_8b.yaml"))
    assert run_plan(recipe, "--nodes", "8") == 0
    assert "FITS: " in capsys.readouterr().out
    assert run_plan(recipe, "--nodes", "8", "--gpu", "a100-40gb") == 1
    printed = capsys.readouterr().out
    assert "DOES NOT FIT: memory: " in printed
    assert "Nearest layouts that fit, fastest first" in printed


def test_json_says_what_the_page_says(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(shipped_recipe("llama3_70b.yaml"))
    assert run_plan(recipe, "--nodes", "64", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    plan = plan_of()
    assert found["fits"] and found["peak_bytes"] == plan.peak_bytes
    assert [stage["total"] for stage in found["stages"]] == [memory.total for memory in plan.memory]
    assert found["phases"][1]["hours"] == plan.phases[1].hours


def test_page_keeps_to_the_width_and_cuts_nothing_short() -> None:
    for plan in (plan_of(), plan_of(name="llama3_8b.yaml", nodes=8, source_tokens=KNOWN)):
        text = plan.text(width=100)
        assert max(map(len, text.splitlines())) <= 100
        assert "…" not in text


def test_sizes_come_from_the_shards_where_there_are_any(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("web", "code"):
        with ShardWriter(tmp_path / name / "0", np.dtype(np.int32)) as writer:
            for _ in range(50):
                writer.add_document([1] * 1000)
    recipe = str(shipped_recipe("llama3_8b.yaml"))
    overrides = [
        argument
        for name in ("web", "code")
        for argument in ("--set", f"data.sources.{name}.shards={tmp_path / name}")
    ]
    assert run_plan(recipe, "--nodes", "8", "--json", *overrides) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["epochs"]["web"][-1] == pytest.approx(
        sum(phase["tokens_by_source"]["web"] for phase in found["phases"]) / 50_000
    )
    apart = [*overrides, "--set", "data.isolate_documents=true"]
    assert run_plan(recipe, "--nodes", "8", "--json", *apart) == 1
    lengths = np.full(50, 1000)
    for phase in json.loads(capsys.readouterr().out)["phases"]:
        assert phase["flops_per_token"] == model_flops_per_token(
            recipe_of("llama3_8b.yaml").model,
            vocab_size=128_256,
            seq_length=phase["seq_length"],
            keys_per_token=keys_in_documents(lengths, phase["seq_length"]),
        )


def test_plan_takes_less_than_two_seconds_and_no_torch() -> None:
    program = (
        "import sys\nfrom megatron_curr.cli import main\n"
        "code = main(['plan', 'configs/llama3_70b.yaml', '--nodes', '64'])\n"
        "loaded = {'torch', 'megatron', 'transformers'} & set(sys.modules)\n"
        "sys.exit(f'loaded {loaded}' if loaded else code)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    # Of the processor: other work on the machine is not the plan's.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2


VIDEO = """\
name: clips
model: {preset: dit_10b}
data:
  buckets:
    image: {height: 512, width: 512, num_frames: 1, batch_samples: 1024}
    clip: {height: 720, width: 1280, num_frames: 105, batch_samples: 64}
  sources:
    images: {shards: none, buckets: [image]}
    clips: {shards: none, buckets: [clip]}
curriculum:
  phases:
    - name: both
      tokens: 200B
      mixture: {images: 0.5, clips: 0.5}
      buckets: {image: 1, clip: 1}
      global_batch_tokens: 8M
      learning_rate: 1e-4
    - {name: clips, tokens: 100B, mixture: {clips: 1}}
parallel:
  tensor_model_parallel_size: 4
  sequence_parallel: true
  context_parallel_size: 2
  micro_batch_tokens: 20000
  use_distributed_optimizer: true
  recompute_granularity: full
checkpoint: {every_tokens: 10B}
evaluation: {every_tokens: 10B, tokens_per_source: 1M}
"""


def test_video_is_planned_by_its_buckets(tmp_path: Path) -> None:
    file = tmp_path / "video.yaml"
    file.write_text(VIDEO)
    cluster = Cluster(num_nodes=16, gpus_per_node=8, gpu=find_gpu("h100-80gb"))
    plan = plan_run(load_recipe(file), cluster)
    assert plan.fits and plan.parameters == 10_830_321_984
    both, clips = plan.phases
    of_image, of_clip = 6.33e13 / 1024, 8.77e15 / 50_400
    assert clips.flops_per_token == pytest.approx(of_clip, rel=0.01)
    assert both.flops_per_token == pytest.approx((of_image + of_clip) / 2, rel=0.01)
    assert both.steps.tokens_by_source["images/image"] == pytest.approx(100e9, rel=1e-3)
    assert plan.batch.seq_length == 50_402  # memory is that of the longest clips
    assert clips.tokens_per_s < both.tokens_per_s
