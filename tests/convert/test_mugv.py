"""Between our checkpoints of the video transformer and the released layout of MUG-V."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from megatron_curr.convert.mugv import mugv_pieces
from megatron_curr.recipe.video_model import VideoDiT


def released_shapes() -> dict[str, str]:
    """Of the 10B model's 1,197 tensors; the file lists one block of 56."""
    lines = Path(__file__).with_name("mugv_dit_keys.tsv").read_text().splitlines()
    shapes = dict(line.split("\t") for line in lines)
    block = {name: shape for name, shape in shapes.items() if name.startswith("blocks.0.")}
    for layer in range(1, 56):
        shapes |= {name.replace(".0.", f".{layer}.", 1): shape for name, shape in block.items()}
    return shapes


def test_names_and_shapes_are_the_released_ones() -> None:
    pieces = list(mugv_pieces(VideoDiT.model_validate({"preset": "dit_10b"})))
    assert {piece.published: str(piece.shape) for piece in pieces} == released_shapes()
    assert len(pieces) == 1197


def test_every_row_of_ours_is_published_once() -> None:
    model = VideoDiT.model_validate({"preset": "dit_debug"})
    for piece in mugv_pieces(model):
        rows = sorted(piece.rows)
        assert rows[0][0] == 0 and rows[-1][1] == piece.shape[0]
        assert all(end == start for (_, end), (start, _) in pairwise(rows))
