"""What a SentencePiece model says of itself: how it treats text, and what each piece is. No torch.

Kinds of pieces and the treatment of text stand in the model file's protobuf; the library answers
for the ids.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_curr.data.tokenizer import SentencePieceTokenizer, Tokenizer

BPE = 2  # TrainerSpec.ModelType
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # SentencePiece.Type
_MODEL_TYPES = {1: "unigram", 3: "word", 4: "char"}


def read_model(path: Path) -> Any:
    """The model's protobuf: ``pieces``, ``normalizer_spec``, ``trainer_spec``."""
    from sentencepiece import sentencepiece_model_pb2

    return sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())


def named_pieces(model: Any, eod_id: int) -> dict[str, str]:
    """The pieces that a model itself names, as Hugging Face calls them."""
    trainer = model.trainer_spec
    ids = {"bos": trainer.bos_id, "eos": eod_id, "unk": trainer.unk_id, "pad": trainer.pad_id}
    return {f"{name}_token": model.pieces[id].piece for name, id in ids.items() if id >= 0}


def why_not_fast(tokenizer: Tokenizer) -> str | None:
    """Why a tokenizer has no exact ``tokenizer.json``; None when it has one."""
    if not isinstance(tokenizer, SentencePieceTokenizer):
        return None
    model = read_model(tokenizer.path)
    kind = model.trainer_spec.model_type
    if kind != BPE:
        return f"it is a {_MODEL_TYPES.get(kind, kind)} model, not BPE"
    if model.normalizer_spec.precompiled_charsmap:
        name = model.normalizer_spec.name or "a table of its own"
        return f"it normalises text ({name}, not identity)"
    if not model.normalizer_spec.escape_whitespaces:
        return "it keeps spaces as they are (escape_whitespaces is false)"
    if any(piece.type == UNUSED for piece in model.pieces):
        return "it has pieces that are marked as unused"
    return None


def publishing_warning(tokenizer: Tokenizer) -> str | None:
    """What to know of a tokenizer before a run is trained with it; None for most."""
    reason = why_not_fast(tokenizer)
    return reason and (
        f"warning: {tokenizer.path}: {reason}, so an export of the run has no tokenizer.json, only "
        "this file and the slow class of transformers that reads it; for a fast one train BPE with "
        "byte fallback and without normalisation, as `megatron-curr train-tokenizer` does"
    )
