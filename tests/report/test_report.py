"""The page of a run: complete, self-contained, and drawn for any state of the run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from megatron_curr.errors import CheckpointError
from megatron_curr.recipe.load import load_recipe
from megatron_curr.report import build_report, write_report
from megatron_curr.report.build import FIGURES
from megatron_curr.report.facts import (
    largest_mixture_gap,
    phase_facts,
    restarts,
    source_groups,
    switches,
)
from megatron_curr.report.records import read_run
from tests.report.synthetic import DEMO_RECIPE, many_sources, write_run

LOADS = {"src", "href", "data", "srcset", "poster", "action"}
VOID = {"meta", "link", "br", "img", "input", "hr"}
MOST_BYTES = 1_500_000


class Page(HTMLParser):
    """Collects what the tests ask for; fails on tags that do not close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.figures: dict[str, int] = {}
        self.words: list[str] = []
        self._figure = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [f"{tag} {name}={value}" for name, value in attrs if name in LOADS]
        if tag == "figure":
            self._figure = dict(attrs).get("id") or ""
            self.figures[self._figure] = 0
        if tag in {"path", "rect", "circle"} and self._figure:
            self.figures[self._figure] += 1
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag == "figure":
            self._figure = ""

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def check_page(text: str) -> Page:
    page = Page(text)
    assert set(FIGURES) <= set(page.figures)
    assert page.loads == []
    assert "url(" not in text
    assert "@import" not in text
    assert set(re.findall(r"https?://[\w./]+", text)) <= {"http://www.w3.org/2000/svg"}
    assert len(text.encode()) < MOST_BYTES
    assert not re.search(r'="[^"]*\b(nan|inf)\b', text)
    for script in re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', text):
        for series in json.loads(script)["series"]:
            assert len(series["x"]) == len(series["y"])
    return page


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", restart_at_tokens=300_000)


def test_every_chart_of_a_finished_run_is_drawn(finished: Path) -> None:
    page = check_page(build_report(finished))
    assert min(page.figures.values()) >= 3
    words = " ".join(page.words)
    for expected in ("finished", "prose", "code", "math", "short", "mixed", "anneal", "Recipe"):
        assert expected in words
    assert "tensor_model_parallel_size" in words


def test_the_page_lands_in_the_run_folder_whole(finished: Path) -> None:
    assert write_report(finished) == finished / "report.html"
    assert not list(finished.glob(".report*"))


def test_an_unfinished_run_with_a_torn_line(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", until_tokens=230_000, torn_last_line=True)
    words = " ".join(check_page(build_report(run)).words)
    assert "not finished" in words
    assert "1 unreadable line" in words


def test_a_run_without_a_step(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", until_tokens=1)
    (run / "metrics.jsonl").write_text("")
    assert "no step yet" in " ".join(check_page(build_report(run)).words)
    (run / "metrics.jsonl").unlink()
    check_page(build_report(run))


@pytest.mark.parametrize("num_sources", [1, 2, 8, 9, 40])
def test_one_to_many_sources(tmp_path: Path, num_sources: int) -> None:
    run = write_run(tmp_path / "run", recipe=many_sources(num_sources), until_tokens=250_000)
    check_page(build_report(run))
    groups = source_groups(read_run(run))
    assert len(groups) == min(num_sources, 9)
    assert {name for group in groups for name in group.sources} == set(
        read_run(run).recipe.data.sources
    )


def test_names_and_recipe_text_are_escaped(finished: Path) -> None:
    path = finished / "recipe.yaml"
    path.write_text(path.read_text() + "# <script>alert(1)</script> & more\n")
    assert "<script>alert" not in build_report(finished)


def test_restarts_and_switches_are_found(finished: Path) -> None:
    run = read_run(finished)
    (at_tokens,) = restarts(run)
    assert abs(at_tokens - 300_000) < 5_000
    assert [switch.into for switch in switches(run)] == ["mixed", "anneal"]
    assert [switch.seq_length_changes for switch in switches(run)] == [True, False]


def test_a_run_in_one_piece_has_no_restart(tmp_path: Path) -> None:
    assert restarts(read_run(write_run(tmp_path / "run"))) == ()


def test_the_plan_of_the_table_adds_up(finished: Path) -> None:
    run = read_run(finished)
    facts = phase_facts(run)
    for phase in facts:
        assert sum(phase.planned_source_tokens.values()) == pytest.approx(
            phase.planned_tokens, abs=2
        )
        assert phase.consumed_tokens == phase.planned_tokens
    assert facts[0].planned_source_tokens["math"] == pytest.approx(0, abs=1)
    ramp = facts[1].planned_tokens * 0.35 / 2
    assert facts[1].planned_source_tokens["math"] == pytest.approx(ramp, rel=1e-2)
    assert sum(phase.num_steps for phase in facts) == len(run.steps)


def test_a_source_off_its_plan_is_reported(finished: Path) -> None:
    path = finished / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        if "data/code/consumed_tokens" in row:
            row["data/code/consumed_tokens"] += 9_000
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    gap_tokens, source = largest_mixture_gap(read_run(finished))
    assert source == "code"
    assert gap_tokens == pytest.approx(9_000, abs=1_000)


def test_the_table_of_a_run_counts_only_what_was_trained(tmp_path: Path) -> None:
    recipe = load_recipe(DEMO_RECIPE)
    half_tokens = recipe.curriculum.phases[0].tokens // 2
    run = read_run(write_run(tmp_path / "run", recipe=recipe, until_tokens=half_tokens))
    first, second, third = phase_facts(run)
    assert 0 < first.consumed_tokens < first.planned_tokens
    assert second.consumed_tokens == third.consumed_tokens == 0
    assert second.epochs == {}
    assert np.isnan(third.step_time_s[0])


@pytest.mark.parametrize("place", ["missing", "empty"])
def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, place: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="not a run folder"):
        write_report(tmp_path / place)


def test_the_report_is_written_without_torch(finished: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from megatron_curr.report import write_report; "
        f"write_report(Path({str(finished)!r})); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
