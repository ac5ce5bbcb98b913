"""The codec and the text encoder that a model speaks: its run's, those of shards, or named ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_curr.data.codecs import Codec, load_codec
from megatron_curr.data.text_features import TextEncoder, load_text_encoder
from megatron_curr.data.video_manifest import VideoManifest, read_video_manifest
from megatron_curr.errors import DataError
from megatron_curr.recipe.video_model import VideoDiT
from megatron_curr.recipe.video_schema import VideoRecipe

DEFAULT_FPS = 24.0


@dataclass(frozen=True, slots=True)
class Speech:
    """Where to find them; None: from the run's own shards."""

    shards: Path | None = None
    codec: str | None = None
    text_encoder: str | None = None


OF_THE_RUN = Speech()


@dataclass(frozen=True, slots=True)
class Encoders:
    """Both, and the frame rate of the clips that they were used on."""

    codec: Codec
    text: TextEncoder
    fps: float


def choose_encoders(speech: Speech, recipe: VideoRecipe | None, model: VideoDiT) -> Encoders:
    """Raises ``DataError`` where they are not told, or are of another model."""
    if speech.codec is not None and speech.text_encoder is not None:
        codec, text = load_codec(speech.codec), load_text_encoder(speech.text_encoder)
        encoders = Encoders(codec, text, DEFAULT_FPS)
    elif recipe is None and speech.shards is None:
        raise DataError(
            "the model is no run, so nothing says which codec and text encoder it speaks; give "
            "--codec and --text-encoder, or shards made with them (--shards)"
        )
    else:
        manifest = manifest_of(recipe, speech.shards)
        codec, text = open_encoders(manifest, speech)
        encoders = Encoders(codec, text, float(manifest.options.get("fps", DEFAULT_FPS)))
    _check_widths(encoders, model)
    return encoders


def _check_widths(encoders: Encoders, model: VideoDiT) -> None:
    codec, text = encoders.codec.record, encoders.text.record
    for name, what, found, wanted in (
        (codec.name, "latent channels", codec.channels, model.in_channels),
        (text.name, "numbers a text token", text.width, model.text_hidden_size),
    ):
        if found != wanted:
            raise DataError(
                f"{name}: makes {found} {what}, and the model takes {wanted}; give the one it was "
                "trained with"
            )


def manifest_of(recipe: VideoRecipe | None, shards: Path | None) -> VideoManifest:
    """What made the shards: the run's, or others like them. Raises ``DataError``."""
    if shards is not None or recipe is None:
        assert shards is not None
        return read_video_manifest(shards)
    folder = Path(next(iter(recipe.data.sources.values())).shards)
    if not folder.is_dir():
        raise DataError(
            f"{folder}: the run's shards are not there, and they say which codec and text encoder "
            "the model speaks; run from the folder the run was started in, give shards of the same "
            "codec and encoder (--shards), or name both (--codec, --text-encoder)"
        )
    return read_video_manifest(folder)


def open_encoders(
    manifest: VideoManifest, speech: Speech = OF_THE_RUN
) -> tuple[Codec, TextEncoder]:
    """Those that made the shards, wherever they are now.

    Raises ``DataError`` where they have changed since.
    """
    codec = load_codec(speech.codec or manifest.codec.name)
    encoder = load_text_encoder(speech.text_encoder or manifest.text_encoder.name)
    for record, wanted in (
        (codec.record, manifest.codec),
        (encoder.record, manifest.text_encoder),
    ):
        if record.sha256 != wanted.sha256:
            raise DataError(
                f"{wanted.name}: is not what the shards were made with (sha256 "
                f"{record.sha256[:12]}, then {wanted.sha256[:12]}); put the old weights back"
            )
    return codec, encoder
