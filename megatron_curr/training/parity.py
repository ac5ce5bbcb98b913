"""Does a layout train the model that another one trains?

A layout takes some steps through the real loader and ``Stepper`` and is observed: first weights,
loss and gradient norm of every step, the first step's gradients and the last weights gathered to
whole tensors, and whether all copies of a parameter hold the same bits. Two observations are then
compared.

What counts as a difference. For a tensor, ``|x - y| / max(|y|, floor)`` in 2-norms, where ``y`` is
the reference's and ``floor`` is ``FLOOR`` times the norm the tensor would have if its entries were
as large, by root mean square, as those of the tensor with the largest ones. A norm for each tensor,
because an entry may cancel to anything, while a mistake of a layout (a missing sum, a factor) moves
a whole tensor by a good part of itself. A floor, because rounding does not shrink with a gradient
that cancels: what is left of a tensor a thousand times smaller than its neighbours is partly noise.
The floor hides a wrong tensor only where it is ``tolerance * FLOOR`` (2e-8) of the largest.
For a loss or a gradient norm, ``|x - y| / |y|``. First weights and replicas must be bit-equal.

Two settings of the optimizer are not the recipe's. Every step is taken at the recipe's highest
learning rate: in a warm-up from zero the weights would hardly move, and the optimizer be untested.
And Adam's epsilon is the root mean square of the first gradient: at the usual 1e-8 Adam
makes a full step of an entry whose gradient is all rounding, in a direction that rounding chose
(measured: weights of sound layouts 4e-5 apart after ten steps, from a few entries in thousands).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

import megatron_curr.parallel  # noqa: F401  (stand-ins come before megatron-core)

# isort: split
from megatron.core.optimizer import MegatronOptimizer

from megatron_curr.errors import DataError
from megatron_curr.parallel.data_parallel import finish_param_gather
from megatron_curr.parallel.full_tensors import full_gradients, full_parameters, unequal_replicas
from megatron_curr.parallel.groups import build_groups, destroy_groups
from megatron_curr.recipe.phases import Piece
from megatron_curr.recipe.schema import RunRecipe
from megatron_curr.training.build import build_loader, build_model, build_stepper
from megatron_curr.training.parity_verdict import (
    FIRST_WEIGHTS,
    GRAD_NORM,
    GRADIENTS,
    LOSS,
    REPLICAS,
    WEIGHTS,
    Difference,
    Verdict,
)
from megatron_curr.training.preflight import Prepared

FLOOR = 1e-3


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What some steps on one layout gave; tensors are whole, by name, in model order."""

    losses: list[float]  # nats per token, one a step
    grad_norms: list[float]  # before clipping
    first_weights: dict[str, Tensor]
    gradients: dict[str, Tensor]  # of the first step
    weights: dict[str, Tensor]  # after the last step
    unequal_replicas: list[str]

    def save(self, path: Path) -> None:
        """Write it for ``load``."""
        torch.save(asdict(self), path)

    @classmethod
    def load(cls, path: Path) -> Observation:
        """Inverse of ``save``; tensors stay on the disk until they are read."""
        return cls(**torch.load(path, mmap=True, weights_only=True))


def observe(prepared: Prepared, num_steps: int) -> Observation:
    """Take the run's first steps on the layout of its recipe. Collective.

    ``torch.distributed`` is initialised; process groups are made and destroyed here. Every rank
    gathers the whole model, three times.
    """
    recipe = prepared.recipe
    groups = build_groups(recipe.parallel, seed=recipe.seed)
    chunks, optimizer = build_model(recipe, groups=groups, vocab_size=prepared.vocab_size)
    stepper = build_stepper(prepared, groups, chunks, optimizer)
    first_weights = full_parameters(chunks, groups)
    losses, grad_norms = [], []
    gradients: dict[str, Tensor] = {}
    learning_rate = highest_learning_rate(recipe)
    clock_tokens = 0
    with build_loader(prepared, groups) as loader:
        for _ in range(num_steps):
            plan = prepared.schedule.at(clock_tokens)
            loss = stepper.forward_backward(loader.take(plan))
            if not gradients:
                gradients = full_gradients(chunks, groups)
                soften_adam(optimizer, gradients, clip_grad=recipe.optimizer.clip_grad)
            if (mean := loss.mean) is None:
                raise DataError(
                    f"step {plan.step} reads no token that carries loss, so there is nothing to "
                    "compare; take other sources, or other first phases, for this check"
                )
            update = stepper.update(replace(plan, learning_rate=learning_rate), loss)
            losses.append(mean)
            grad_norms.append(update.grad_norm)
            clock_tokens = plan.next_consumed_tokens
    finish_param_gather(chunks)
    observation = Observation(
        losses=losses,
        grad_norms=grad_norms,
        first_weights=first_weights,
        gradients=gradients,
        weights=full_parameters(chunks, groups),
        unequal_replicas=unequal_replicas(chunks, groups),
    )
    destroy_groups()
    return observation


def soften_adam(
    optimizer: MegatronOptimizer, gradients: Mapping[str, Tensor], *, clip_grad: float
) -> None:
    """Set Adam's epsilon to the root mean square of the gradient after clipping. Collective."""
    norm = math.sqrt(sum(float(gradient.double().norm()) ** 2 for gradient in gradients.values()))
    count = sum(gradient.numel() for gradient in gradients.values())
    shared = [min(norm, clip_grad) / math.sqrt(count)]
    dist.broadcast_object_list(shared, src=0)  # to the bit, also where ranks hold other gradients
    for group in optimizer.param_groups:
        group["eps"] = shared[0]


def compare(
    ours: Observation,
    reference: Observation,
    *,
    layout: str,
    num_ranks: int,
    tolerance: float,
) -> Verdict:
    """How far ``ours`` is from the reference; see the head of this file for what counts."""
    quantities = {
        FIRST_WEIGHTS: list(_bit_differences(ours.first_weights, reference.first_weights)),
        GRADIENTS: list(differences(GRADIENTS, ours.gradients, reference.gradients)),
        WEIGHTS: list(differences(WEIGHTS, ours.weights, reference.weights)),
        LOSS: [Difference(LOSS, None, _largest_ratio(ours.losses, reference.losses))],
        GRAD_NORM: [
            Difference(GRAD_NORM, None, _largest_ratio(ours.grad_norms, reference.grad_norms))
        ],
        REPLICAS: [Difference(REPLICAS, name, math.inf) for name in ours.unequal_replicas],
    }
    tolerances = {FIRST_WEIGHTS: 0.0}
    return Verdict(
        layout=layout,
        num_ranks=num_ranks,
        largest={
            name: max(found, key=lambda difference: _rank_of(difference.relative))
            for name, found in quantities.items()
            if found
        },
        differing=tuple(
            difference
            for name, found in quantities.items()
            for difference in found
            if not difference.relative <= tolerances.get(name, tolerance)
        ),
    )


def highest_learning_rate(recipe: RunRecipe) -> float:
    """The highest value that the learning rate takes in any phase."""
    rates: list[float] = []
    for phase in recipe.curriculum.phases:
        curve = phase.learning_rate
        for piece in curve if isinstance(curve, list) else [curve]:
            ends = (piece.from_, piece.to) if isinstance(piece, Piece) else (piece,)
            rates += [end for end in ends if end is not None]
    return max(rates)


def differences(
    quantity: str, ours: Mapping[str, Tensor], reference: Mapping[str, Tensor]
) -> Iterator[Difference]:
    """How far each parameter of either side is off, in the reference's order; see above."""
    largest_rms = max(_rms(tensor) for tensor in reference.values())
    for name in dict.fromkeys([*reference, *ours]):
        if not _are_alike(name, ours, reference):
            yield Difference(quantity, name, math.inf)
            continue
        theirs = reference[name].double()
        floor = FLOOR * largest_rms * math.sqrt(theirs.numel())
        size = max(float(theirs.norm()), floor)
        distance = float((ours[name].double() - theirs).norm())
        yield Difference(quantity, name, distance / size if size else distance)


def _bit_differences(
    ours: Mapping[str, Tensor], reference: Mapping[str, Tensor]
) -> Iterator[Difference]:
    """As ``differences``, but 0 only where every bit is the same."""
    for difference in differences(FIRST_WEIGHTS, ours, reference):
        name = difference.parameter
        is_equal = _are_alike(name, ours, reference) and torch.equal(ours[name], reference[name])
        yield difference if not is_equal else replace(difference, relative=0.0)


def _are_alike(name: str, ours: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> bool:
    return name in ours and name in reference and ours[name].shape == reference[name].shape


def _rms(tensor: Tensor) -> float:
    return float(tensor.double().norm()) / math.sqrt(max(tensor.numel(), 1))


def _largest_ratio(ours: Sequence[float], reference: Sequence[float]) -> float:
    """Largest relative difference of any step."""
    ratios = [
        abs(mine - theirs) / abs(theirs) if theirs else abs(mine - theirs)
        for mine, theirs in zip(ours, reference, strict=True)
    ]
    return max(ratios, key=_rank_of)


def _rank_of(relative: float) -> float:
    """Not a number is worse than any."""
    return math.inf if math.isnan(relative) else relative
