"""What a model writes is what its Hugging Face export writes, from every form it is kept in."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch

from megatron_curr.cli import main
from megatron_curr.convert.run_conversion import run_conversion
from megatron_curr.errors import RecipeError
from megatron_curr.sample.text import Generated, Sampling, distribution, generate
from tests.convert.saved_runs import save_run, write_corpus

PROMPTS = ["a tensor has", "x = [1,", ""]
GREEDY = Sampling(max_tokens=12)


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run saved by two ranks, its Hugging Face export, and a checkpoint made of that."""
    folder = tmp_path_factory.mktemp("forms")
    write_corpus(folder / "corpus")
    run = save_run(folder / "corpus", folder / "run", tp=2)
    run_conversion(run, folder / "hf", verify=False)
    run_conversion(folder / "hf", folder / "checkpoint", verify=False)
    (checkpoint,) = (run / "checkpoints").glob("step_*")
    named = {"hf": folder / "hf", "converted": folder / "checkpoint"}
    return {"run": run, "its checkpoint": checkpoint, **named}


@pytest.fixture(scope="module")
def greedy(forms: dict[str, Path]) -> list[Generated]:
    return list(generate(forms["run"], PROMPTS, GREEDY))


def test_greedy_is_what_transformers_writes(
    forms: dict[str, Path], greedy: list[Generated]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(forms["hf"], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(forms["hf"])
    for made in greedy[:2]:
        ids = torch.tensor([tokenizer(made.prompt, add_special_tokens=False)["input_ids"]])
        theirs = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
        )[0, ids.shape[1] :].tolist()
        assert made.tokens == theirs
        assert made.finish == "max tokens"


@pytest.mark.parametrize("form", ["its checkpoint", "hf", "converted"])
def test_every_form_of_a_model_writes_the_same(
    forms: dict[str, Path], greedy: list[Generated], form: str
) -> None:
    made = list(generate(forms[form], PROMPTS, GREEDY))
    # Bytes that are no text look otherwise in other libraries, so the ids are compared.
    assert [(one.tokens, one.finish) for one in made] == [(g.tokens, g.finish) for g in greedy]


def test_it_ends_at_the_longest_sequence(forms: dict[str, Path]) -> None:
    (made,) = generate(forms["run"], ["a tensor"], Sampling(max_tokens=500, temperature=1.0))
    assert made.finish in ("longest sequence", "end of text")
    assert len(made.tokens) < 64
    with pytest.raises(RecipeError, match="and the model takes 64 with what follows"):
        list(generate(forms["run"], ["a tensor has rows " * 30], GREEDY))


def test_what_is_drawn_depends_on_the_seed_alone(forms: dict[str, Path]) -> None:
    how = Sampling(max_tokens=8, temperature=1.5, top_k=50, top_p=0.9, seed=3)
    first = list(generate(forms["run"], PROMPTS[:2], how, num_samples=2))
    assert list(generate(forms["run"], PROMPTS[:2], how, num_samples=2)) == first
    assert [made.prompt for made in first] == [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2
    assert first[0].tokens != first[1].tokens
    other = Sampling(max_tokens=8, temperature=1.5, top_k=50, top_p=0.9, seed=4)
    assert list(generate(forms["run"], PROMPTS[:2], other, num_samples=2)) != first


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [None, 1, 5, 400])
@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.9, 1.0])
def test_chances_are_those_of_transformers(
    temperature: float, top_k: int | None, top_p: float
) -> None:
    from transformers.generation.logits_process import (
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    logits_V = torch.randn(300, generator=torch.Generator().manual_seed(5)) * 3
    scores = TemperatureLogitsWarper(temperature)(None, logits_V[None])
    if top_k is not None:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    how = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    torch.testing.assert_close(distribution(logits_V, how), scores[0].softmax(dim=-1))


def test_prompts_come_from_arguments_a_file_and_the_input(
    forms: dict[str, Path],
    greedy: list[Generated],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file, run = tmp_path / "prompts.txt", str(forms["run"])
    file.write_text("\n".join(PROMPTS[:2]) + "\n")
    options = ["--max-tokens", "12", "--json"]
    monkeypatch.setattr("sys.stdin", io.StringIO(file.read_text()))
    for given in ([run, *PROMPTS[:2]], [run, "--file", str(file)], [run]):
        assert main(["generate", *given, *options]) == 0
        rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert rows == [json.loads(made.as_json()) for made in greedy[:2]]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--temperature", "0", "--top-p", "0.5"], "takes the likeliest token"),
        (["--top-p", "0"], "--top-p 0: must be above 0 and at most 1"),
        (["--file", "nope.txt"], "give one of them"),
        (["--weights", "ema"], "average"),
    ],
)
def test_mistakes_are_told(
    forms: dict[str, Path],
    arguments: list[str],
    complaint: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["generate", str(forms["run"]), "a", *arguments]) == 2
    assert complaint in capsys.readouterr().err
