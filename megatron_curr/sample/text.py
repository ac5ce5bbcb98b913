"""Prompts to text, by any text model that `convert` reads: greedy, or drawn from the distribution.

Every token is a forward pass over all before it, by the model that training runs, so what comes out
is what the checkpoint says. There is no cache of keys and values: it is for looking at a model, not
for serving it.

Legend: S tokens so far, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

import megatron_curr.parallel  # noqa: F401  (stand-ins come before megatron-core)
from megatron_curr.convert.export import documents_begin_with
from megatron_curr.convert.load import load_weights
from megatron_curr.convert.source import Source, Which, open_source
from megatron_curr.convert.video import is_video
from megatron_curr.data.identity import load_tokenizer_of
from megatron_curr.data.tokenizer import Tokenizer, load_tokenizer
from megatron_curr.errors import CheckpointError, RecipeError
from megatron_curr.models.gpt import build_gpt
from megatron_curr.parallel.groups import build_groups, destroy_groups, one_rank
from megatron_curr.recipe.parallel import Parallel

Finish = Literal["end of text", "max tokens", "longest sequence"]
_SEED_STRIDE = 1_000_003  # between texts, so that each draws from numbers of its own


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen; ``temperature`` 0 takes the likeliest.

    ``top_k`` keeps the likeliest k, then ``top_p`` the fewest that hold this probability together.
    """

    max_tokens: int = 100
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises ``RecipeError`` for what contradicts itself."""
        if not 0 < self.top_p <= 1:
            raise RecipeError(f"--top-p {self.top_p:g}: must be above 0 and at most 1")
        if self.temperature == 0 and (self.top_k is not None or self.top_p < 1):
            raise RecipeError(
                "--temperature 0 takes the likeliest token: leave out --top-k and --top-p, or "
                "give a temperature above 0"
            )


@dataclass(frozen=True)
class Generated:
    """One text. ``text`` is what follows the prompt; ``tokens`` are its ids."""

    prompt: str
    text: str
    tokens: list[int]
    finish: Finish

    def as_json(self) -> str:
        """For scripts, on one line."""
        return json.dumps(asdict(self), ensure_ascii=False)


def generate(
    path: Path,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    num_samples: int = 1,
    which: Which = "raw",
    tokenizer: Path | None = None,
    bos: str = "auto",
) -> Iterator[Generated]:
    """``num_samples`` texts for each prompt, by the newest checkpoint of a run or the model given.

    A text depends on its prompt, its place and the seed alone. ``tokenizer`` is by default the
    run's, or the one beside the model; ``bos`` is what ``preprocess`` calls so, where ``auto`` is
    what the run's shards hold. Raises ``CheckpointError``, ``DataError`` or ``RecipeError``.
    """
    if is_video(path):
        raise RecipeError(f"{path}: is a model of video; use megatron-curr sample")
    source = open_source(path, which=which)
    words = _tokenizer_of(source, tokenizer)
    is_of_shards = bos == "auto" and source.run is not None
    start = documents_begin_with(source.run.recipe)[0] if is_of_shards else words.bos_ids(bos)
    contexts = [_context(prompt, words, start) for prompt in prompts]
    longest = source.model.max_position_embeddings
    for prompt, ids in zip(prompts, contexts, strict=True):
        if len(ids) >= longest:
            raise RecipeError(
                f"prompt {prompt[:40]!r}...: has {len(ids):,} tokens and the model takes "
                f"{longest:,} with what follows; shorten it"
            )
    limit = min(words.vocab_size, source.vocab_size)
    with text_model(source) as model:
        for number, (prompt, ids) in enumerate(zip(prompts, contexts, strict=True)):
            for sample in range(num_samples):
                draw = torch.Generator().manual_seed(
                    sampling.seed + _SEED_STRIDE * (number * num_samples + sample)
                )
                made, finish = continue_tokens(
                    model, ids, sampling, eod_id=words.eod_id, vocab_size=limit,
                    longest=longest, draw=draw,
                )  # fmt: skip
                yield Generated(prompt, _text_after(words, ids, made), made, finish)


@contextmanager
def text_model(source: Source) -> Iterator[nn.Module]:
    """The source's model on one rank, in fp32 on a CPU and as stored on a GPU."""
    with one_rank():
        parallel = Parallel(micro_batch_tokens=1)  # nothing is trained
        groups = build_groups(parallel)
        try:
            is_bf16 = source.weights.dtype("embedding.word_embeddings.weight") is torch.bfloat16
            model = build_gpt(
                source.model,
                parallel=parallel,
                precision="bf16" if groups.device.type == "cuda" and is_bf16 else "fp32",
                groups=groups,
                vocab_size=source.vocab_size,
                isolate_documents=False,
                seed=None,
            ).eval()
            load_weights([model], source, groups=groups, vocab_size=source.vocab_size)
            yield model.to(groups.device)
        finally:
            destroy_groups()


@torch.no_grad()
def continue_tokens(
    model: nn.Module,
    ids: Sequence[int],
    sampling: Sampling,
    *,
    eod_id: int,
    vocab_size: int,
    longest: int,
    draw: torch.Generator,
) -> tuple[list[int], Finish]:
    """What the model writes after ``ids``, without the end-of-document token, and why it ended."""
    device = next(model.parameters()).device
    made: list[int] = []
    while len(made) < sampling.max_tokens:
        context_S = torch.tensor([*ids, *made])
        if len(context_S) >= longest:
            return made, "longest sequence"
        positions_S = torch.arange(len(context_S), device=device)
        logits_SV = model(context_S.to(device)[None], positions_S[None], None)[0]
        token = choose(logits_SV[-1, :vocab_size].float().cpu(), sampling, draw)
        if token == eod_id:
            return made, "end of text"
        made.append(token)
    return made, "max tokens"


def choose(logits_V: Tensor, sampling: Sampling, draw: torch.Generator) -> int:
    """The next token; of equal logits the first."""
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    return int(torch.multinomial(distribution(logits_V, sampling), 1, generator=draw))


def distribution(logits_V: Tensor, sampling: Sampling) -> Tensor:
    """[V] probabilities that a token is drawn by, after temperature, ``top_k`` and ``top_p``."""
    scaled_V = logits_V / sampling.temperature
    ordered_V, tokens_V = scaled_V.sort(descending=True, stable=True)
    if sampling.top_k is not None:
        ordered_V[sampling.top_k :] = -torch.inf
    chances_V = ordered_V.softmax(dim=-1)
    before_V = chances_V.cumsum(dim=-1) - chances_V
    chances_V[before_V >= sampling.top_p] = 0.0
    return torch.zeros_like(chances_V).scatter_(0, tokens_V, chances_V / chances_V.sum())


def _tokenizer_of(source: Source, given: Path | None) -> Tokenizer:
    if given is not None:
        return load_tokenizer(given)
    if source.run:
        return load_tokenizer_of(source.run.folder, source.run.recipe.data.tokenizer)
    if source.carried is None:
        raise CheckpointError(f"{source.path}: has no tokenizer beside it; give --tokenizer")
    return load_tokenizer(source.carried)


def _context(prompt: str, words: Tokenizer, start: tuple[int, ...]) -> list[int]:
    """Ids of the prompt; of an empty one what a document comes after: its BOS, or an EOD."""
    return [*start, *words.encode(prompt)] or [words.eod_id]


def _text_after(words: Tokenizer, ids: Sequence[int], made: Sequence[int]) -> str:
    """The text of ``made``, with the blank that some decoders drop at the start of a text."""
    before, whole = words.decode(ids), words.decode([*ids, *made])
    return whole[len(before) :] if whole.startswith(before) else words.decode(made)
