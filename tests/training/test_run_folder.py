"""Coming back to a run folder: what is refused, and that the lock goes with its holder."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from megatron_curr.curriculum.ledger import amend, append_entries, open_ledger
from megatron_curr.data import manifest
from megatron_curr.data.identity import load_tokenizer_of
from megatron_curr.data.shards import ShardWriter
from megatron_curr.errors import CheckpointError, DataError, RecipeError
from megatron_curr.incarnation.fence import Pen
from megatron_curr.recipe.load import load_recipe
from megatron_curr.trace import trace_command
from megatron_curr.trace_verify import verify_run
from megatron_curr.training import preflight
from megatron_curr.training.checkpoint_folder import (
    RunState,
    SourceState,
    is_keeper,
    publish,
    read_state,
    retire,
    step_folder_name,
    write_manifest,
)
from megatron_curr.training.preflight import prepare
from megatron_curr.training.run_folder import RunFolder
from tests.training.runs import Runs
from tests.training.tiny import VOCAB_SIZE, recipe_values, write_recipe


def saved_state(step: int, **changes: object) -> RunState:
    values = {
        "consumed_tokens": step * 256,
        "step": step,
        "optimizer_step": step,
        "ledger_head": "0" * 64,
        "recipe_fingerprint": "f",
        "sources": {"prose": SourceState(consumed_tokens=step * 256, epochs=0.1, num_tokens=999)},
        "nonfinite_steps": 0,
        "nonfinite_in_a_row": 0,
        "keep": False,
        "layout": {"dp": 1},
        "versions": {},
    }
    return RunState(**{**values, **changes})  # type: ignore[arg-type]


def save(folder: Path, state: RunState) -> Path:
    """A checkpoint without tensors."""
    pen, name = Pen.beside(folder), step_folder_name(state.step)
    saving = pen.make(name)
    (saving / "state.json").write_text(state.to_json())
    write_manifest(saving, {})
    publish(saving, folder / name, pen)
    return folder / name


def test_state_survives_the_disk(tmp_path: Path) -> None:
    state = saved_state(7, keep=True)
    assert read_state(save(tmp_path, state)) == state
    assert (tmp_path / "latest").read_text() == "step_00000007\n"


def test_retention(tmp_path: Path) -> None:
    for step in range(1, 7):
        keep = is_keeper(tmp_path, step * 256, 700)
        save(tmp_path, saved_state(step, keep=keep))
        retire(tmp_path, 2, Pen.beside(tmp_path))
    assert sorted(path.name for path in tmp_path.glob("step_*")) == [
        "step_00000003",  # first past 700
        "step_00000005",  # last two, of which the sixth is the first past 1400
        "step_00000006",
    ]


def test_a_new_run_may_have_any_recipe_and_a_saved_one_may_not(runs: Runs, tmp_path: Path) -> None:
    here = {"run_folder": str(tmp_path / "run")}
    recipe = load_recipe(runs.recipe("any", here))
    folder = RunFolder(recipe.folder)
    assert folder.check_recipe(recipe) == []
    folder.write_records(recipe, open_ledger(recipe.curriculum), Pen.beside(folder.path))
    other = load_recipe(runs.recipe("any", here | {"seed": 1, "evaluation.every_tokens": 999}))
    assert folder.check_recipe(other) == []
    save(folder.checkpoints, saved_state(1))
    with pytest.raises(CheckpointError, match=r"seed: was 11, is 1; put the old value back"):
        folder.check_recipe(other)
    allowed = load_recipe(runs.recipe("any", here | {"evaluation.every_tokens": 999}))
    assert [change.path for change in folder.check_recipe(allowed)] == ["evaluation.every_tokens"]


def test_a_moved_run_is_resumed_where_it_is_and_its_first_recipe_knows_of_amendments(
    runs: Runs, tmp_path: Path
) -> None:
    here = {"run_folder": str(tmp_path / "old")}
    first = load_recipe(runs.recipe("moved", here))
    longer = load_recipe(runs.recipe("moved", here | {"curriculum.phases.1.tokens": 8192}))
    folder = RunFolder(first.folder)
    opened = open_ledger(first.curriculum)
    folder.write_records(longer, opened, Pen.beside(folder.path))
    entries = amend(opened, longer.curriculum, from_tokens=1024, reason="longer")
    append_entries(folder.ledger, entries[1:])
    sizes = {"prose": SourceState(consumed_tokens=1024, epochs=0.1, num_tokens=32_988)}
    save(folder.checkpoints, saved_state(4, sources=sizes))
    assert folder.under_ledger(first) == longer
    never = load_recipe(runs.recipe("moved", here | {"curriculum.phases.1.tokens": 6144}))
    assert folder.under_ledger(never) == never  # check_recipe refuses it
    with pytest.raises(CheckpointError, match="megatron-curr amend"):
        folder.check_recipe(never)

    moved = folder.path.rename(tmp_path / "new")
    for named in (moved, moved / "recipe.yaml"):
        assert load_recipe(named).folder == moved
    elsewhere = tmp_path / "elsewhere"
    assert load_recipe(moved, [f"run_folder={elsewhere}"]).folder == elsewhere
    prepared = prepare(load_recipe(moved), 1)
    assert prepared.folder.path == moved and prepared.ledger == entries
    assert not prepared.is_of_before_amendment
    with pytest.raises(RecipeError, match=r"a folder without recipe.yaml, so not that of a run"):
        load_recipe(tmp_path)


def test_an_amendment_before_the_first_checkpoint_is_kept(runs: Runs, tmp_path: Path) -> None:
    recipe = load_recipe(runs.recipe("any"))
    longer = load_recipe(runs.recipe("any", {"curriculum.phases.1.tokens": 8192}))
    folder = RunFolder(tmp_path)
    opened = open_ledger(recipe.curriculum)
    folder.write_records(recipe, opened, Pen.beside(tmp_path))
    amended = amend(opened, longer.curriculum, from_tokens=1024, reason="longer")
    append_entries(folder.ledger, amended[1:])
    folder.write_records(recipe, opened, Pen.beside(tmp_path))  # a start that had read it before
    assert folder.read_ledger(longer) == amended
    assert folder.read_ledger(recipe) == opened  # another recipe begins anew
    folder.ledger.write_text("torn")
    assert folder.read_ledger(longer) == open_ledger(longer.curriculum)


def test_shards_that_changed_since_the_save_are_refused(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    save(folder.checkpoints, saved_state(1))
    folder.check_sources({"prose": 999, "code": 5})
    with pytest.raises(CheckpointError, match=r"prose: its shards held 999 .* hold 1,000 now"):
        folder.check_sources({"prose": 1000})


def other_words(tokenizer: Path) -> None:
    """A tokenizer of the same size that splits otherwise."""
    text = tokenizer.with_suffix(".txt")
    words = [f"{a}{b}{c}" for a in "bdfgvwxz" for b in "aeiouy" for c in "bcdfghkp"]
    text.write_text("\n".join(" ".join(words[i::23]) for i in range(23)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(tokenizer.with_suffix("")),
        vocab_size=VOCAB_SIZE,
        byte_fallback=True,
        hard_vocab_limit=True,
        minloglevel=2,
    )


def test_other_files_and_another_tokenizer_under_a_run_are_refused(
    runs: Runs, tmp_path: Path
) -> None:
    corpus = tmp_path / "corpus"
    shutil.copytree(runs.corpus, corpus)
    recipe = load_recipe(write_recipe(tmp_path / "r.yaml", recipe_values(corpus, tmp_path / "run")))
    prepared = prepare(recipe, 1)
    folder = prepared.folder
    folder.write_records(recipe, prepared.ledger, Pen.beside(folder.path), data=prepared.data)
    save(folder.checkpoints, saved_state(1, sources={}))
    assert prepare(recipe, 1).data == prepared.data
    (line,) = trace_command(folder.path, text=False)
    assert "prose" in line

    tokenizer = corpus / "tokenizer.model"
    known = tokenizer.read_bytes()
    other_words(tokenizer)
    with pytest.raises(CheckpointError, match=r"data.tokenizer: sha256 .* ids mean other text"):
        prepare(recipe, 1)
    with pytest.raises(CheckpointError, match=r"ids mean other text now; put back"):
        list(trace_command(folder.path, text=True))
    with pytest.raises(CheckpointError, match=r"put back what was there at .*tokenizer.model"):
        load_tokenizer_of(folder.path, recipe.data.tokenizer)  # as export and generate do
    tokenizer.write_bytes(known)
    assert load_tokenizer_of(folder.path, recipe.data.tokenizer).path == tokenizer

    for split, place in (("heldout", "prose.heldout"), ("train", "prose.shards")):
        shard = corpus / "prose" / f"{split}.bin"
        tokens = np.fromfile(shard, np.uint16)
        np.roll(tokens, 1).tofile(shard)
        with pytest.raises(CheckpointError, match=rf"{place}: not the files .*{split}.bin, 1 of 1"):
            prepare(recipe, 1)
        assert prepare(recipe, 1, looks_at_data=False).data is None  # one rank looks for all
        tokens.tofile(shard)
    prepare(recipe, 1)
    np.roll(tokens, 1).tofile(shard)
    with pytest.raises(CheckpointError, match="trace says would not be what the run read"):
        list(trace_command(folder.path))
    folder.metrics.touch()
    with pytest.raises(CheckpointError, match="trace says would not be what the run read"):
        verify_run(folder.path)


def test_held_out_shards_that_are_trained_on_are_refused(runs: Runs) -> None:
    shards = str(runs.corpus / "prose" / "train")
    recipe = runs.recipe("leaking", {"data.sources.code.heldout": shards})
    with pytest.raises(DataError, match=r"prose.shards and data.sources.code.heldout both read"):
        prepare(load_recipe(recipe), 1)
    assert not (runs.folder / "leaking").exists()


def test_the_lock_names_its_holder_and_dies_with_it(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with forked(lambda: folder.lock()) as child:
        with pytest.raises(CheckpointError, match=f"already in use by pid {child} on host"):
            folder.check_free()
        with pytest.raises(CheckpointError, match="already in use"):
            folder.lock()
    with folder.lock():
        pass


def test_a_forked_child_does_not_keep_the_lock(tmp_path: Path) -> None:
    lock = RunFolder(tmp_path).lock()
    with forked(lambda: None):
        lock.release()
        RunFolder(tmp_path).lock().release()


@contextmanager
def forked(first: Callable[[], object]) -> Iterator[int]:
    """A child that does something and then lives until it is killed."""
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        kept = first()
        os.write(tell, b"x")
        signal.pause()
        os._exit(int(kept is None))
    try:
        os.read(told, 1)
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_folder_that_cannot_be_written_is_named(runs: Runs, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file/run: the run folder cannot be written"):
        RunFolder(tmp_path / "file" / "run").lock()


def test_preparing_checks_tokenizer_vocabulary_and_shards(runs: Runs, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"model.vocab_size=100 is smaller than the 320 pieces"):
        prepare(load_recipe(runs.recipe("small_vocabulary", {"model.vocab_size": 100})), 1)
    prepared = prepare(load_recipe(runs.recipe("wide", {"model.vocab_size": 512})), 1)
    assert prepared.vocab_size == 512
    assert prepared.schedule.total_tokens == 8192
    with ShardWriter(tmp_path / "one", np.dtype(np.uint16)) as writer:
        writer.add_document([1, 2])
    single = {"data.sources.prose.shards": str(tmp_path / "one")}
    with pytest.raises(RecipeError, match=r"data.sources.prose holds 2 tokens"):
        prepare(load_recipe(runs.recipe("short", single)), 1)


def test_ids_of_another_tokenizer_are_found_before_anything_is_written(
    runs: Runs, tmp_path: Path
) -> None:
    with ShardWriter(tmp_path / "other", np.dtype(np.uint16)) as writer:
        writer.add_document(np.full(100_000, 5000))
    recipe = runs.recipe("foreign", {"data.sources.code.shards": str(tmp_path / "other")})
    with pytest.raises(DataError, match=r"other.bin: token \d+ has id 5000, but the vocabulary"):
        prepare(load_recipe(recipe), 1)
    assert not (runs.folder / "foreign").exists()


def test_shards_that_another_tokenizer_made_are_refused(runs: Runs, tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "other" / "a", np.dtype(np.uint16)) as writer:
        writer.add_document(np.full(100_000, 5))
    assert writer.record is not None
    made_by = manifest.TokenizerRecord("elsewhere.model", "ab" * 32, 320, 2)
    made = manifest.Manifest("uint16", made_by, (writer.record,))
    manifest.write_manifest(tmp_path / "other", made)
    recipe = runs.recipe("other", {"data.sources.code.shards": str(tmp_path / "other")})
    with pytest.raises(DataError, match=r"code: made with the tokenizer elsewhere.model, .*abab"):
        prepare(load_recipe(recipe), 1)
    assert not (runs.folder / "other").exists()


def test_sources_that_differ_in_their_bos_are_refused(runs: Runs, tmp_path: Path) -> None:
    overrides = {}
    for name, bos_ids in (("prose", (1,)), ("code", ())):
        with ShardWriter(tmp_path / name / "a", np.dtype(np.uint16)) as writer:
            writer.add_document(np.full(100_000, 5))
        assert writer.record is not None
        made_by = manifest.TokenizerRecord("a.model", "ab" * 32, 320, 2, bos_ids)
        made = manifest.Manifest("uint16", made_by, (writer.record,))
        manifest.write_manifest(tmp_path / name, made)
        overrides[f"data.sources.{name}.shards"] = str(tmp_path / name)
    with pytest.raises(DataError, match=r"BOS ids \[1?\], but those of .* with \[1?\]; preproc"):
        prepare(load_recipe(runs.recipe("bos", overrides)), 1)
    assert not (runs.folder / "bos").exists()


def test_a_missing_package_is_named(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "find_spec", lambda package: None)
    wanted = {"logging": {"wandb_project": "p"}}
    with pytest.raises(RecipeError, match=r"logging.wandb_project is set but the package wandb"):
        prepare(load_recipe(runs.recipe("logged", wanted)), 1)
