"""Verbs on checkpoints: convert, merge, generate."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from megatron_curr.cli.app import app
from megatron_curr.cli.work import ClusterProfile, cluster_profile
from megatron_curr.errors import CheckpointError, RecipeError

if TYPE_CHECKING:
    from launch.slurm.profile import Profile
    from megatron_curr.convert.run_conversion import Conversion

Target = Literal["hf", "checkpoint"]
ConvertTarget = Literal["hf", "checkpoint", "mugv"]
OutputArgument = Annotated[Path, typer.Argument(help="Folder to write; must not hold anything.")]
ToOption = Annotated[
    Target | None,
    typer.Option(
        help="hf (a Hugging Face folder) or checkpoint (torch_dist). Default: the other one."
    ),
]
DtypeOption = Annotated[str | None, typer.Option(help="fp32, bf16 or fp16. Default: as stored.")]
VerifyOption = Annotated[
    bool | None,
    typer.Option(
        "--verify/--no-verify",
        help="Run the same tokens through both models. Default: where both fit into memory.",
    ),
]
TrustOption = Annotated[
    bool,
    typer.Option("--trust-pickle", help="Read .bin files that hold more than tensors: runs code."),
]
EveryOption = Annotated[
    bool,
    typer.Option(
        "--every-checkpoint",
        help="Of a run: each to a folder of its name in OUTPUT, those that are not there yet.",
    ),
]
ArrayOption = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Let Slurm do --every-checkpoint, N at the same time."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the outcome as JSON.")]


@app.command(epilog="Example: megatron-curr convert runs/demo_text runs/demo_text/hf")
def convert(
    source: Annotated[
        Path,
        typer.Argument(help="A run, one of its checkpoints, a converted one or a model folder."),
    ],
    output: OutputArgument,
    to: Annotated[
        ConvertTarget | None,
        typer.Option(
            help="hf (a Hugging Face folder), checkpoint (torch_dist), or of a video model mugv "
            "(dit.pt). Default: the other one, and mugv for a video model's checkpoint."
        ),
    ] = None,
    dtype: DtypeOption = None,
    weights: Annotated[
        Literal["raw", "ema"],
        typer.Option(help="Of a run: the trained weights, or their moving average."),
    ] = "raw",
    architecture: Annotated[
        str | None, typer.Option(help="Hugging Face architecture, where several fit.")
    ] = None,
    chat_template: Annotated[
        Path | None, typer.Option(help="Jinja file to publish as the chat template.")
    ] = None,
    verify: VerifyOption = None,
    trust_pickle: TrustOption = False,
    every_checkpoint: EveryOption = False,
    slurm_array: ArrayOption = None,
    profile: ClusterProfile = None,
    as_json: JsonOption = False,
) -> None:
    """Write a checkpoint as a Hugging Face folder, or a Hugging Face folder as a checkpoint."""
    _check_there(source)
    how = _How(to, dtype, weights, architecture, chat_template, verify, trust_pickle)
    if slurm_array is not None and not every_checkpoint:
        raise RecipeError("--slurm-array: is for --every-checkpoint, an element for each")
    if not every_checkpoint:
        _tell(_convert(source, output, how), as_json=as_json)
        return
    pairs = _not_there_yet(source, output)
    if not pairs:
        typer.echo(f"{output}: every checkpoint is there", err=as_json)
        return
    if slurm_array is not None:
        typer.echo(_submit(pairs, output, how, cluster_profile(profile), at_once=slurm_array))
        return
    faults = []
    for checkpoint, target in pairs:
        try:
            _tell(_convert(checkpoint, target, how), as_json=as_json)
        except CheckpointError as error:
            faults.append(str(error))
    if faults:
        raise CheckpointError("\n".join([*faults, "the other checkpoints are converted"]))


@dataclass(frozen=True)
class _How:
    """The options of one conversion."""

    to: ConvertTarget | None
    dtype: str | None
    weights: Literal["raw", "ema"]
    architecture: str | None
    chat_template: Path | None
    verify: bool | None
    trust_pickle: bool

    def words(self) -> list[str]:
        """The same as they are typed."""
        named = {
            "--to": self.to,
            "--dtype": self.dtype,
            "--weights": self.weights,
            "--architecture": self.architecture,
            "--chat-template": self.chat_template and self.chat_template.resolve(),
        }
        words = [f"{name}={value}" for name, value in named.items() if value is not None]
        if self.verify is not None:
            words.append("--verify" if self.verify else "--no-verify")
        return [*words, *(["--trust-pickle"] if self.trust_pickle else [])]


def _check_there(*sources: Path) -> None:
    """Raise ``CheckpointError`` for what is not there at all, before the slow imports."""
    from megatron_curr.recipe.problems import did_you_mean

    for source in sources:
        if not source.exists():
            beside = sorted(path.name for path in source.parent.glob("[!.]*") if path.is_dir())
            hint = did_you_mean(source.name, beside, what=f"folders of {source.parent}")
            hint = hint if beside else "give a run, a checkpoint or a model folder"
            raise CheckpointError(f"{source}: no such folder; {hint}")


def _convert(source: Path, output: Path, how: _How) -> Conversion:
    from megatron_curr.convert.run_conversion import run_conversion
    from megatron_curr.convert.video import convert_video, is_video

    if is_video(source):
        return convert_video(
            source,
            output,
            to=how.to,
            dtype=how.dtype,
            which=how.weights,
            trust_pickle=how.trust_pickle,
        )
    if how.to == "mugv":
        raise RecipeError("--to mugv: is for video models; leave it out")
    return run_conversion(
        source,
        output,
        to=how.to,
        dtype=how.dtype,
        architecture=how.architecture,
        chat_template=how.chat_template,
        verify=how.verify,
        trust_pickle=how.trust_pickle,
        which=how.weights,
    )


def _not_there_yet(run: Path, output: Path) -> list[tuple[Path, Path]]:
    """A run's checkpoints, oldest first, each with the folder it goes to."""
    from megatron_curr.training.checkpoint_folder import list_checkpoints

    checkpoints = list_checkpoints(run / "checkpoints")
    if not checkpoints:
        raise CheckpointError(f"{run}: --every-checkpoint, but {run / 'checkpoints'} holds none")
    return [(path, output / path.name) for path in checkpoints if not (output / path.name).exists()]


def _submit(
    pairs: list[tuple[Path, Path]], output: Path, how: _How, site: Profile, *, at_once: int
) -> str:
    """Submit a conversion for each pair; what to tell about it. ``OUTPUT.jobs`` is their log."""
    from launch.slurm.array import fresh_log_folder, submit_array, verb

    commands = [
        verb(site, ["convert", str(path.resolve()), str(target.resolve()), *how.words()])
        for path, target in pairs
    ]
    folder, name = fresh_log_folder(output), f"convert-{output.name}"
    cpus = site.cpus_per_rank or 1
    job = submit_array(commands, site, folder=folder, name=name, at_once=at_once, cpus=cpus)
    return f"submitted {len(commands)} conversions as array {job}; they print to {folder}"


@app.command(
    epilog="Example: megatron-curr merge averaged runs/a/checkpoints/step_00000100 "
    "runs/a/checkpoints/step_00000200"
)
def merge(
    output: OutputArgument,
    sources: Annotated[list[Path], typer.Argument(help="As for convert, two or more.")],
    method: Annotated[
        Literal["average", "linear", "spherical", "residual"],
        typer.Option(
            help="average of all; linear or spherical from the first to the second; residual: the "
            "first plus (the second less the third)."
        ),
    ] = "average",
    by: Annotated[
        float | None,
        typer.Option(
            help="How far to go; how much of the residual to add. Default: 1; not for average."
        ),
    ] = None,
    to: ToOption = "hf",
    dtype: DtypeOption = None,
    trust_pickle: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Combine checkpoints of one architecture into one, streaming."""
    _check_there(*sources)
    from megatron_curr.convert.merge import merge as merged
    from megatron_curr.convert.run_conversion import convert_source
    from megatron_curr.convert.source import open_source
    from megatron_curr.convert.video import (
        convert_video_source,
        is_video,
        open_video_source,
        video_pieces,
    )

    videos = [path for path in sources if is_video(path)]
    if videos and len(videos) < len(sources):
        raise RecipeError(f"{videos[0]} is a video model and others are not; merge one kind")
    if videos:
        opened = [open_video_source(path, trust_pickle=trust_pickle) for path in sources]
        source = merged(opened, method=method, by=by, pieces_of=video_pieces)
        done = convert_video_source(source, output, to=to or "hf", dtype=dtype)
    else:
        opened = [open_source(path, trust_pickle=trust_pickle) for path in sources]
        source = merged(opened, method=method, by=by)
        done = convert_source(source, output, to=to or "hf", dtype=dtype)
    _tell(done, as_json=as_json)


@app.command(epilog='Example: megatron-curr generate runs/demo_text "The list of" --max-tokens 40')
def generate(
    model: Annotated[
        Path,
        typer.Argument(help="A run (its newest checkpoint), a checkpoint, or what convert reads."),
    ],
    prompts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PROMPT]...", help="Texts to go on from. Default: a line each of the input."
        ),
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option("--file", help="Texts to go on from, a line each.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write at most.")] = 100,
    temperature: Annotated[
        float | None,
        typer.Option(min=0, help="0: the likeliest. Default: 0, or 1 with --top-k or --top-p."),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Draw among so many of the likeliest.")
    ] = None,
    top_p: Annotated[
        float, typer.Option(help="Draw among the fewest likely that hold this probability.")
    ] = 1.0,
    num_samples: Annotated[int, typer.Option(min=1, help="Texts for each prompt.")] = 1,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
    weights: Annotated[
        Literal["raw", "ema"],
        typer.Option(help="Of a run: the trained weights, or their moving average."),
    ] = "raw",
    tokenizer: Annotated[
        Path | None, typer.Option(help="Default: the run's, or the one beside the model.")
    ] = None,
    bos: Annotated[
        str,
        typer.Option(metavar="auto|yes|no", help="BOS before a prompt; auto: as in training."),
    ] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="A line of JSON for each text.")] = False,
) -> None:
    """Let a text model go on from prompts: greedy, or drawn by temperature, top-k and top-p."""
    _check_there(model)
    texts = _prompts(prompts, prompt_file)
    from megatron_curr.sample.text import Sampling
    from megatron_curr.sample.text import generate as generated

    if temperature is None:
        temperature = 0.0 if top_k is None and top_p == 1 else 1.0
    how = Sampling(
        max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
    )
    made = generated(
        model, texts, how, num_samples=num_samples, which=weights, tokenizer=tokenizer, bos=bos
    )
    for one in made:
        typer.echo(one.as_json() if as_json else f"{one.prompt}{one.text}\n[{one.finish}]")


def _prompts(given: list[str] | None, file: Path | None) -> list[str]:
    """From the command line, a file or the input. Raises ``RecipeError`` where there are none."""
    if given and file:
        raise RecipeError("--file and a PROMPT: give one of them")
    if given:
        return given
    if file is None and sys.stdin.isatty():
        raise RecipeError("no prompt; write one behind the model, give --file, or pipe them in")
    try:
        text = file.read_text(encoding="utf-8") if file else sys.stdin.read()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{file or 'the input'}: cannot be read as prompts ({error})") from None
    lines = [line for line in text.splitlines() if line]
    if not lines:
        raise RecipeError(f"{file or 'the input'}: holds no prompt; write one a line")
    return lines


def _tell(done: Conversion, *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(asdict(done), default=str, indent=2))
        return
    for fault in done.passed_over:
        typer.echo(f"passed over {fault}", err=True)
    typer.echo(
        f"{done.folder}: {done.architecture}, {done.num_parameters:,} parameters, "
        f"{done.size_bytes / 1e9:.2f} GB, from {done.source}"
    )
    for note in done.notes:
        typer.echo(note)
    typer.echo(done.verdict)
