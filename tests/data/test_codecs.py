from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.make_video_demo import draw, scene
from megatron_curr.data.codecs import HaarCodec, load_codec
from megatron_curr.data.text_features import HashedSubwords, load_text_encoder, pad_text
from megatron_curr.errors import DataError


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / ((one.astype(float) - other) ** 2).mean()))


def test_haar_decodes_to_something_to_look_at() -> None:
    codec = HaarCodec()
    found = [
        psnr(codec.decode(codec.encode(clip)), clip) for clip in map(draw, map(scene, range(14)))
    ]
    assert np.mean(found) > 22  # 24.2 over the demo's first 84 clips


@settings(max_examples=20)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2**31))
def test_haar_is_inverted_as_far_as_its_channels_go(t: int, y: int, x: int, seed: int) -> None:
    codec = HaarCodec()
    blocks = np.random.default_rng(seed).integers(0, 256, (2 * t, 2 * y, 2 * x, 3), dtype=np.uint8)
    frames = blocks.repeat(4, 0).repeat(4, 1).repeat(4, 2)
    latents = codec.encode(frames)
    assert latents.shape == (24, t, y, x) and latents.dtype == np.float32
    np.testing.assert_array_equal(codec.decode(latents), frames)


def test_every_eight_frames_are_encoded_on_their_own() -> None:
    codec, frames = HaarCodec(), draw(scene(5))
    whole = codec.encode(frames)
    parts = [codec.encode(frames[first : first + 8]) for first in range(0, 32, 8)]
    np.testing.assert_array_equal(whole, np.concatenate(parts, 1))


def test_a_first_frame_alone_is_an_image_latent() -> None:
    codec, frames = HaarCodec(), draw(scene(5))
    picture = codec.encode(frames[:1])
    assert picture.shape == (24, 1, 8, 8)
    np.testing.assert_array_equal(codec.encode(frames[:9])[:, :1], picture)
    assert (codec.decode(picture) == codec.decode(picture)[:1]).all()
    with pytest.raises(DataError, match=r"num_frames 12: .* take 8, 9 or 16"):
        codec.check_frames(12)


def test_latents_of_the_demo_have_about_unit_variance() -> None:
    latents = np.concatenate([HaarCodec().encode(draw(scene(n))) for n in range(0, 84, 6)], 1)
    assert 0.7 < latents[:15].std() < 1.3 and latents.std((1, 2, 3)).max() < 1.4


@pytest.fixture(scope="module")
def image_vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.5,
        shift_factor=0.25,
    ).save_pretrained(folder)
    return folder


def test_a_diffusers_image_autoencoder_is_opened_by_its_folder(image_vae: Path) -> None:
    from diffusers import AutoencoderKL

    codec = load_codec(f"diffusers:{image_vae}")
    assert codec.record.compression == (1, 2, 2) and codec.record.channels == 4
    assert codec.record.mean == (0.25,) * 4 and codec.record.std == (2.0,) * 4
    frames = draw(scene(3), size=16, num_frames=20)
    latents = codec.encode(frames)
    assert latents.shape == (4, 20, 8, 8)
    model = AutoencoderKL.from_pretrained(image_vae)
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        raw = model.encode(pixels).latent_dist.mode()
    expected = ((raw - 0.25) * 0.5).transpose(0, 1)
    np.testing.assert_allclose(latents, expected.numpy(), atol=1e-5)
    assert codec.decode(latents).shape == frames.shape
    assert codec.encode(draw(scene(3), size=17, num_frames=2)).shape == (4, 2, 8, 8)
    # The hash is of the weights: it moves when they do.
    assert load_codec(f"diffusers:{image_vae}").record == codec.record


def test_a_diffusers_video_autoencoder_says_which_lengths_it_takes(tmp_path: Path) -> None:
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    AutoencoderKLWan(
        base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, attn_scales=[]
    ).save_pretrained(tmp_path)
    codec = load_codec(f"diffusers:{tmp_path}")
    assert codec.record.compression == (4, 8, 8) and codec.record.channels == 16
    frames = draw(scene(3), size=32, num_frames=9)
    latents = codec.encode(frames)
    assert latents.shape == (16, 3, 4, 4)
    assert codec.decode(latents).shape == frames.shape
    with pytest.raises(DataError, match="takes one frame and then 4 at a time; take 5 or 9"):
        codec.check_frames(8)


def test_words_are_near_words_they_share_letters_with() -> None:
    encoder = HashedSubwords(256)
    text = encoder.encode("A red square moves left!")
    assert text.shape == (7, 256) and text.dtype == np.float32
    assert 0.7 < text.std() < 1.3
    np.testing.assert_array_equal(encoder.encode("red"), text[[1, 6]])
    assert encoder.encode("").shape == (1, 256)
    assert len(encoder.encode("word " * 1000)) == 300
    moving, moves, blue = (encoder.encode(word)[0] for word in ("moving", "moves", "blue"))
    assert np.corrcoef(moving, moves)[0, 1] > 0.2 > abs(np.corrcoef(moving, blue)[0, 1])


def test_a_transformers_encoder_is_opened_by_its_folder(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    words = {"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3, "red": 4, "square": 5}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(tmp_path)
    torch.manual_seed(0)
    config = T5Config(vocab_size=6, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    model = T5EncoderModel(config).eval()
    model.save_pretrained(tmp_path)
    encoder = load_text_encoder(f"transformers:{tmp_path}")
    assert encoder.record.width == 16
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([[3, 4, 5]])).last_hidden_state[0]
    np.testing.assert_allclose(encoder.encode("a red square"), expected.numpy(), atol=1e-6)
    assert encoder.encode("").shape == (1, 16)
    padded, lengths = pad_text([encoder.encode("a red square"), encoder.encode("red")])
    assert padded.shape == (2, 3, 16) and lengths.tolist() == [3, 1] and not padded[1, 1:].any()


@pytest.mark.parametrize(
    ("load", "name", "message"),
    [
        (load_codec, "wavelet", "codec 'wavelet': not known; use 'haar'"),
        (load_codec, "mugv", "use .* or 'mugv:FILE'"),
        (load_codec, "diffusers:/nowhere", "cannot be loaded"),
        (load_text_encoder, "hashed:0", "use 'hashed:WIDTH'"),
        (load_text_encoder, "t5", "use 'hashed:WIDTH'"),
        (load_text_encoder, "transformers:/nowhere", "cannot be loaded"),
    ],
)
def test_an_unknown_codec_or_encoder_is_refused(load, name: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(name)
