from __future__ import annotations

import dataclasses

import pytest

from megatron_curr.data.codecs import HaarCodec
from megatron_curr.data.text_features import HashedSubwords
from megatron_curr.data.video_manifest import VideoManifest
from megatron_curr.errors import DataError
from megatron_curr.recipe.load import load_recipe
from megatron_curr.recipe.shipped import shipped_recipe
from megatron_curr.recipe.video_schema import VideoRecipe
from megatron_curr.sample.run import Wish, last_timestep_shift, open_encoders


def test_a_codec_that_is_not_the_shards_own_is_refused() -> None:
    codec, text = HaarCodec().record, HashedSubwords(8).record
    manifest = VideoManifest(codec, text, buckets={}, tars=(), index_sha256="")
    assert open_encoders(manifest)[0].record == codec
    other = dataclasses.replace(codec, sha256="f" * 64)
    with pytest.raises(DataError, match="haar: is not what the shards were made with"):
        open_encoders(dataclasses.replace(manifest, codec=other))
    other_text = dataclasses.replace(text, sha256="f" * 64)
    with pytest.raises(DataError, match="hashed:8: is not what the shards were made with"):
        open_encoders(dataclasses.replace(manifest, text_encoder=other_text))


def test_the_schedule_is_shifted_as_the_last_phase_was() -> None:
    recipe = load_recipe(shipped_recipe("demo_video.yaml"))
    assert isinstance(recipe, VideoRecipe)
    assert last_timestep_shift(recipe) == 3


@pytest.mark.parametrize(
    ("wish", "message"),
    [({"prompts": ()}, "give --prompt"), ({"prompts": ("a",), "num_steps": 0}, "1 or more")],
)
def test_wishes_that_cannot_be_met_are_refused(wish: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Wish(**wish)
