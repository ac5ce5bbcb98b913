"""A loss or gradient that is not finite: refused, counted, and at the limit the end of the run."""

from __future__ import annotations

import pytest

from tests.ranks import RankError, run_ranks
from tests.training.runs import Runs, rows

POISONED_TOKEN = 40


def test_an_absurd_learning_rate_ends_the_run_and_names_the_samples(runs: Runs) -> None:
    changes = {
        "curriculum.phases.0.learning_rate": 1e30,
        "checkpoint.every_tokens": 8192,
        "training.max_nonfinite_steps": 2,
    }
    message = (
        r"NonFiniteLimit: stopped at step (\d+), \d+ consumed tokens: the loss or the gradient was "
        r"not finite in 2 steps in a row .* Samples (\d+) to (\d+) fed them; see them with: "
        r"megatron-curr trace .*/absurd --position \2 --count 16 --text"
    )
    with pytest.raises(RankError, match=message):
        runs.train("absurd", changes=changes, ranks=2)
    run = runs.folder / "absurd"
    refused = [
        row for row in rows(run, "train/grad_norm") if "train/nonfinite_first_position" in row
    ]
    assert len(refused) == 2
    assert refused[-1]["train/nonfinite_steps"] == 2
    assert refused[-1]["train/nonfinite_num_samples"] == 8
    assert not list((run / "checkpoints").iterdir())


def test_a_refused_update_leaves_weights_and_moments_and_moves_the_clock(runs: Runs) -> None:
    """One row of the embedding is infinite: exactly the steps that read that token are refused."""
    recipe = runs.recipe("poisoned", {"training.max_nonfinite_steps": 100})
    run_ranks(poison_and_train, 1, str(recipe))
    steps = rows(runs.folder / "poisoned", "train/grad_norm")
    assert [row["consumed_tokens"] for row in steps] == [*range(256, 4097, 256)]


def poison_and_train(rank: int, recipe: str) -> None:
    import torch

    from megatron_curr.recipe.load import load_recipe
    from megatron_curr.training import optimizer_state
    from megatron_curr.training.build import build_run
    from megatron_curr.training.life import begin_life
    from megatron_curr.training.preflight import prepare
    from megatron_curr.training.signals import StopSignals

    prepared = prepare(load_recipe(recipe), 1)
    life = begin_life(prepared.folder)
    prepared.folder.write_records(prepared.recipe, prepared.ledger, life.pen)
    with build_run(prepared, life=life, signals=StopSignals()) as run:
        (chunk,) = run.stepper.chunks
        with torch.no_grad():
            chunk.module.embedding.word_embeddings.weight[POISONED_TOKEN] = float("inf")

        def tensors() -> list[torch.Tensor]:
            optimizer = run.stepper.optimizer
            optimizer_state.fill_missing_state(optimizer)
            moments = [
                state[name].clone()
                for state in optimizer.chained_optimizers[0].optimizer.state.values()
                for name in optimizer_state.MOMENTS
            ]
            return [*(param.detach().clone() for param in chunk.parameters()), *moments]

        applied = []
        for _ in range(16):
            plan = run.schedule.at(run.consumed_tokens)
            batches, before = run.take(plan), tensors()
            loss = run.forward_backward(plan, batches)
            update = run.optimizer_step(plan, loss)
            run.consumed_tokens = plan.next_consumed_tokens
            run.log(plan, loss=loss, update=update)
            is_poisoned = any((batch.tokens_BS == POISONED_TOKEN).any() for batch in batches)
            same = all(torch.equal(*pair) for pair in zip(before, tensors(), strict=True))
            assert update.applied == (not is_poisoned)
            assert same == is_poisoned
            applied.append(update.applied)
        assert {True, False} == set(applied)
        assert run.nonfinite_steps == applied.count(False)
        assert run.state().optimizer_step == applied.count(True)
