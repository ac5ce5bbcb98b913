"""The schedule: everything that changes over a run, as a function of consumed tokens.

Phases are laid end to end on the token axis, each made of units: samples of text, all of the
phase's sequence length, or lots of video, whose tokens differ by source and shape. Consecutive
phases of text of one sequence length form a leg, and so do all phases of video: units on both sides
of a boundary inside a leg may share a step, so such a boundary is honoured to the unit. A leg of
text is rounded to whole steps; the last step of a leg of video takes what is left.

A step begins at the first unit that starts at or after a multiple of the batch, counted from the
first of a row of steps with one batch. Units of one size make all those steps equal.

A schedule is compiled from a chain of curricula, each valid from a token on (``Edition``): the
first from 0, the others amendments. What an amendment cuts off keeps the order it was planned with,
so no unit before it moves.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_curr.curriculum.lattice import EvenLattice, Lattice
from megatron_curr.curriculum.phase_curves import PhaseCurves
from megatron_curr.curriculum.planner import Planner, Span, TextPlanner
from megatron_curr.errors import RecipeError
from megatron_curr.recipe.phases import Curriculum, RunPhase
from megatron_curr.recipe.video_phases import VideoCurriculum


@dataclass(frozen=True, slots=True)
class Edition:
    """A curriculum and the token from which it is valid, on the same absolute token axis."""

    from_tokens: int
    curriculum: Curriculum | VideoCurriculum


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Everything one optimizer step needs to know; a pure function of the clock."""

    step: int  # steps before this one
    consumed_tokens: int  # tokens before this step
    step_tokens: int  # that this step consumes
    position: int  # the step's first unit
    num_samples: int  # units of the global batch, all ranks; lots for video
    phase: str  # of the step's first unit
    phase_index: int
    learning_rate: float
    weight_decay: float

    @property
    def seq_length(self) -> int:
        """Tokens of every sample; for video, of a lot on average."""
        return self.step_tokens // self.num_samples

    @property
    def next_consumed_tokens(self) -> int:
        """The clock after this step."""
        return self.consumed_tokens + self.step_tokens


@dataclass(frozen=True, slots=True)
class Stretch:
    """The part of one phase, as one edition planned it, that a run goes through."""

    edition: int
    phase_index: int
    phase: str
    lattice: Lattice
    start_tokens: int
    start_position: int
    planned_samples: int  # units, as this edition laid it out
    num_samples: int  # what is left of that once a later edition has cut it
    curves: PhaseCurves

    @property
    def seq_length(self) -> int:
        """Tokens of every sample of text."""
        assert isinstance(self.lattice, EvenLattice)
        return self.lattice.unit_tokens

    @property
    def end_tokens(self) -> int:
        """The clock when this stretch is over."""
        return self.start_tokens + self.lattice.tokens_before(self.num_samples)

    @property
    def end_position(self) -> int:
        """The first unit after this stretch."""
        return self.start_position + self.num_samples

    def consumed_at(self, position: int) -> int:
        """The clock before this unit."""
        return self.start_tokens + self.lattice.tokens_before(position - self.start_position)

    def position_from(self, consumed_tokens: int) -> int:
        """The first unit that starts at or after this token."""
        return self.start_position + self.lattice.unit_from(consumed_tokens - self.start_tokens)


@dataclass(frozen=True, slots=True)
class StepRun:
    """Steps of one batch in a row."""

    start_tokens: int
    start_step: int
    num_steps: int
    step_tokens: int  # the batch: of every step for text, on average for video
    end_tokens: int  # the clock after the last of them


class Schedule:
    """The compiled curriculum of a run. ``at`` costs a few bisections and keeps no state."""

    def __init__(
        self, sources: tuple[str, ...], planned: Sequence[Stretch], step_runs: Sequence[StepRun]
    ) -> None:
        self.sources = sources
        self.planned = tuple(planned)  # every stretch of every edition, cut ones too
        self.stretches = tuple(stretch for stretch in planned if stretch.num_samples)
        self.step_runs = tuple(step_runs)
        self.total_tokens = self.stretches[-1].end_tokens if self.stretches else 0
        self.total_samples = self.stretches[-1].end_position if self.stretches else 0
        self._stretch_starts = [stretch.start_tokens for stretch in self.stretches]
        self._stretch_positions = [stretch.start_position for stretch in self.stretches]
        self._run_starts = [run.start_tokens for run in self.step_runs]

    @property
    def num_steps(self) -> int:
        """Optimizer steps in the whole run."""
        last = self.step_runs[-1:]
        return sum(run.start_step + run.num_steps for run in last)

    def stretch_at(self, consumed_tokens: int) -> Stretch:
        """The stretch that owns the unit starting at this token; the last one at the end."""
        return self.stretches[max(bisect_right(self._stretch_starts, consumed_tokens) - 1, 0)]

    def at(self, consumed_tokens: int) -> StepPlan:
        """What the step starting at ``consumed_tokens`` does.

        Raises ``ValueError`` where no step starts.
        """
        if not 0 <= consumed_tokens < self.total_tokens:
            raise ValueError(f"token {consumed_tokens} is outside the run of {self.total_tokens}")
        run = self._run_at(consumed_tokens)
        steps = (consumed_tokens - run.start_tokens) // run.step_tokens
        if steps >= run.num_steps or self._edge(run, steps) != consumed_tokens:
            raise ValueError(f"no step starts at token {consumed_tokens}")
        stretch = self.stretch_at(consumed_tokens)
        position = stretch.position_from(consumed_tokens)
        end_tokens = self._edge(run, steps + 1)
        end_position = self._position_from(end_tokens)
        return StepPlan(
            step=run.start_step + steps,
            consumed_tokens=consumed_tokens,
            step_tokens=end_tokens - consumed_tokens,
            position=position,
            num_samples=end_position - position,
            phase=stretch.phase,
            phase_index=stretch.phase_index,
            learning_rate=stretch.curves.learning_rate.at(consumed_tokens),
            weight_decay=stretch.curves.weight_decay.at(consumed_tokens),
        )

    def step_start(self, consumed_tokens: int) -> int:
        """The clock at the start of the step that consumes this token; the end stays the end."""
        if consumed_tokens >= self.total_tokens:
            return self.total_tokens
        run = self._run_at(consumed_tokens)
        steps = (consumed_tokens - run.start_tokens) // run.step_tokens
        edge = self._edge(run, min(steps, run.num_steps - 1))
        return edge if edge <= consumed_tokens else self._edge(run, steps - 1)

    def position_of(self, consumed_tokens: int) -> int:
        """The unit that contains this token."""
        return self.stretch_at(consumed_tokens).position_from(consumed_tokens + 1) - 1

    def consumed_at(self, position: int) -> int:
        """Tokens consumed before this unit."""
        stretch = self.stretches[max(bisect_right(self._stretch_positions, position) - 1, 0)]
        return stretch.consumed_at(position)

    def weights_at(self, consumed_tokens: int) -> dict[str, float]:
        """The planned mixture, by source."""
        weights = self.stretch_at(consumed_tokens).curves.mixture.at(consumed_tokens)
        return dict(zip(self.sources, weights.tolist(), strict=True))

    def ended_at(self, consumed_tokens: int) -> Schedule:
        """The same schedule, over at this token, which must be a step's edge."""
        planned = [_cut(stretch, consumed_tokens) for stretch in self.planned]
        runs = [
            _cut_run(run, consumed_tokens)
            for run in self.step_runs
            if run.start_tokens < consumed_tokens
        ]
        return Schedule(self.sources, planned, runs)

    def _run_at(self, consumed_tokens: int) -> StepRun:
        return self.step_runs[max(bisect_right(self._run_starts, consumed_tokens) - 1, 0)]

    def _edge(self, run: StepRun, steps: int) -> int:
        """The clock after the first ``steps`` steps of a run."""
        if steps >= run.num_steps:
            return run.end_tokens
        tokens = run.start_tokens + steps * run.step_tokens
        stretch = self.stretch_at(tokens)
        return stretch.consumed_at(min(stretch.position_from(tokens), stretch.end_position))

    def _position_from(self, consumed_tokens: int) -> int:
        if consumed_tokens >= self.total_tokens:
            return self.total_samples
        return self.stretch_at(consumed_tokens).position_from(consumed_tokens)


def build_schedule(
    editions: Curriculum | VideoCurriculum | Sequence[Edition], planner: Planner | None = None
) -> Schedule:
    """Compile a curriculum, or a chain of them, into a schedule.

    ``planner`` lays out video (``lots.VideoPlanner``); text brings its own. Raises ``RecipeError``
    where a phase has no unit, a curve has no start, or an amendment does not begin at a step's
    edge.
    """
    if isinstance(editions, Curriculum | VideoCurriculum):
        editions = [Edition(0, editions)]
    if planner is None:
        planner = TextPlanner([edition.curriculum.phases for edition in editions])
    schedule = _compile(editions[0].curriculum.phases, planner, edition=0, since=None)
    for number, edition in enumerate(editions[1:], start=1):
        if schedule.step_start(edition.from_tokens) != edition.from_tokens:
            raise RecipeError(
                f"no step starts at token {edition.from_tokens}: amend at a step's edge"
            )
        past = schedule.ended_at(edition.from_tokens)
        future = _compile(edition.curriculum.phases, planner, edition=number, since=past)
        schedule = Schedule(
            planner.sources, [*past.planned, *future.planned], [*past.step_runs, *future.step_runs]
        )
    return schedule


def _compile(
    phases: Sequence[RunPhase], planner: Planner, *, edition: int, since: Schedule | None
) -> Schedule:
    """Lay out one edition from where ``since`` ends (from 0 without it)."""
    layout = _Layout(planner, edition, since)
    start_tokens, end_tokens = layout.tokens, 0
    held: PhaseCurves | None = None
    leg: list[_Planned] = []
    for index, phase in enumerate(phases):
        begin_tokens, end_tokens = end_tokens, end_tokens + phase.tokens
        held = planner.curves(phase, held, start_tokens=begin_tokens, end_tokens=end_tokens)
        if end_tokens - start_tokens < planner.smallest_unit_tokens(phase, held):
            continue  # over before this edition begins
        if leg and planner.leg_of(leg[-1].phase) != planner.leg_of(phase):
            layout.lay(leg)
            leg = []
        leg.append(_Planned(index, phase, held, end_tokens))
    if not leg:
        raise RecipeError(f"the amended curriculum ends before token {layout.tokens}")
    layout.lay(leg)
    return Schedule(planner.sources, layout.planned, layout.step_runs)


@dataclass(frozen=True, slots=True)
class _Planned:
    """A phase that is about to be laid out."""

    index: int
    phase: RunPhase
    curves: PhaseCurves
    end_tokens: int


class _Layout:
    """Lays legs end to end; remembers where the last one stopped."""

    def __init__(self, planner: Planner, edition: int, since: Schedule | None) -> None:
        self.planner = planner
        self.edition = edition
        self.tokens = since.total_tokens if since else 0
        self.position = since.total_samples if since else 0
        self.step = since.num_steps if since else 0
        self.planned: list[Stretch] = []
        self.step_runs: list[StepRun] = []

    def lay(self, leg: list[_Planned]) -> None:
        """Add phases that may share steps, and their steps."""
        leg_tokens = tokens = self.tokens
        position, first = self.position, len(self.planned)
        for planned in leg:
            lattice, num_units = self.planner.lay(
                planned.phase, planned.curves, Span(tokens, planned.end_tokens, leg_tokens)
            )
            stretch = Stretch(
                edition=self.edition,
                phase_index=planned.index,
                phase=planned.phase.name,
                lattice=lattice,
                start_tokens=tokens,
                start_position=position,
                planned_samples=num_units,
                num_samples=num_units,
                curves=planned.curves,
            )
            self.planned.append(stretch)
            tokens, position = stretch.end_tokens, stretch.end_position
        for stretch in self.planned[first:]:
            self._reach(stretch, last=stretch is self.planned[-1])
        tail = self.planned[-1]
        if self.planner.ends_on_whole_steps:
            # The last phase takes up the rounding: it ends with the last step.
            size = tail.lattice.unit_from(self.tokens - tail.start_tokens)
            tail = replace(tail, planned_samples=size, num_samples=size)
            self.planned[-1] = tail
        self.position = tail.end_position

    def _reach(self, stretch: Stretch, *, last: bool) -> None:
        """Add the stretch's steps: past its end inside a leg, to the nearest edge at the leg's."""
        batch, end_tokens = stretch.curves.batch_tokens, stretch.end_tokens
        while self.tokens < end_tokens:
            step_tokens = self.planner.step_tokens(
                stretch.phase, stretch.lattice, int(batch.at(self.tokens))
            )
            change = batch.next_change(self.tokens, end_tokens)
            num_steps = -(-(change - self.tokens) // step_tokens)
            past_end = self.tokens + num_steps * step_tokens - end_tokens
            is_last = last and past_end >= 0
            # More than half of the last step lies past the end: leave it out, unless the phase
            # would then be empty.
            if last and 2 * past_end > step_tokens:
                num_steps -= 1
                if self._would_be_empty(stretch, num_steps * step_tokens):
                    num_steps += 1
            run_tokens = num_steps * step_tokens
            if is_last and not self.planner.ends_on_whole_steps:
                # The last unit may be in the step before already.
                while num_steps > 1 and self._edge_after(num_steps - 1, step_tokens) >= end_tokens:
                    num_steps -= 1
                run_tokens = end_tokens - self.tokens
            self._add(num_steps, step_tokens, self._edge_from(self.tokens + run_tokens))
            if is_last:
                return

    def _would_be_empty(self, stretch: Stretch, run_tokens: int) -> bool:
        if self.planner.ends_on_whole_steps:
            return self.tokens + run_tokens <= stretch.start_tokens
        return not run_tokens and not self.step_runs

    def _edge_after(self, num_steps: int, step_tokens: int) -> int:
        return self._edge_from(self.tokens + num_steps * step_tokens)

    def _edge_from(self, tokens: int) -> int:
        """The first edge of a unit at or after this token, in what is laid out."""
        starts = [stretch.start_tokens for stretch in self.planned]
        stretch = self.planned[bisect_right(starts, tokens) - 1]
        return stretch.start_tokens + stretch.lattice.tokens_before(
            stretch.lattice.unit_from(tokens - stretch.start_tokens)
        )

    def _add(self, num_steps: int, step_tokens: int, end_tokens: int) -> None:
        """Add steps; without any, the step before takes what they would have held."""
        if num_steps:
            run = StepRun(self.tokens, self.step, num_steps, step_tokens, end_tokens)
            self.step_runs.append(run)
        elif end_tokens > self.tokens:
            self.step_runs[-1] = replace(self.step_runs[-1], end_tokens=end_tokens)
        self.tokens = end_tokens
        self.step += num_steps


def _cut(stretch: Stretch, end_tokens: int) -> Stretch:
    if stretch.end_tokens <= end_tokens:
        return stretch
    left = stretch.lattice.unit_from(max(end_tokens - stretch.start_tokens, 0))
    return replace(stretch, num_samples=left)


def _cut_run(run: StepRun, end_tokens: int) -> StepRun:
    if run.end_tokens <= end_tokens:
        return run
    num_steps = (end_tokens - run.start_tokens) // run.step_tokens
    return replace(run, num_steps=num_steps, end_tokens=end_tokens)
