"""What this machine has, what of it is wrong, and which modules a recipe will use here."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from megatron_curr.incarnation.surroundings import Surroundings, is_of_a_launcher, pins_threads
from megatron_curr.recipe.schema import Recipe
from megatron_curr.units import format_bytes

SUPPORTED_MEGATRON_CORE = "0.16."
DALI_PACKAGES = ("nvidia-dali-cuda120", "nvidia-dali-cuda130", "nvidia-dali-cuda110")
SLURM_TIMEOUT_S = 10


@dataclass
class Diagnosis:
    """Facts by name, in the order they are printed; ``modules`` by role, for a recipe."""

    found: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    modules: dict[str, str] = field(default_factory=dict)


def doctor(recipe: Recipe | None = None, *, as_json: bool = False) -> str:
    """The diagnosis as text for people, or as one JSON object."""
    diagnosis = diagnose(recipe)
    return json.dumps(asdict(diagnosis), indent=2) if as_json else render(diagnosis)


def diagnose(recipe: Recipe | None = None) -> Diagnosis:
    """Look at everything; nothing that is missing is an error."""
    diagnosis = Diagnosis()
    diagnosis.found["machine"] = _machine()
    diagnosis.found["python"] = platform.python_version()
    _examine_surroundings(diagnosis)
    has_cuda = _examine_torch(diagnosis)
    _examine_megatron_core(diagnosis)
    _examine_transformer_engine(diagnosis, has_cuda=has_cuda)
    _examine_apex(diagnosis)
    diagnosis.found["dali"] = next(
        (f"{name} {found}" for name in DALI_PACKAGES if (found := _version(name))),
        "not installed (extra: dali)",
    )
    _examine_psutil(diagnosis)
    diagnosis.found["slurm"] = _slurm()
    if recipe is not None:
        _examine_recipe(diagnosis, recipe)
    return diagnosis


def render(diagnosis: Diagnosis) -> str:
    """Aligned ``name  fact`` lines, then the modules, then the warnings."""
    width = max(len(name) for name in [*diagnosis.found, *diagnosis.modules]) + 2
    lines = [f"{name:<{width}}{fact}" for name, fact in diagnosis.found.items()]
    if diagnosis.modules:
        lines += ["", "The recipe will use:"]
        lines += [f"{role:<{width}}{module}" for role, module in diagnosis.modules.items()]
    lines += [""] if diagnosis.warnings else []
    lines += [f"warning: {warning}" for warning in diagnosis.warnings]
    return "\n".join(lines)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _machine() -> str:
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"{platform.machine()}, {os.cpu_count()} cores, {format_bytes(memory_bytes)} of memory"


def _examine_surroundings(diagnosis: Diagnosis) -> None:
    """What this shell would hand on: its cores and devices, and variables that change a run."""
    around = Surroundings.of_this_process()
    diagnosis.found["here"] = str(around)
    told = [f"{name}={value}" for name, value in around.variables.items()]
    diagnosis.found["variables"] = ", ".join(told) or "none that changes a run"
    strange = [name for name in around.variables if is_of_a_launcher(name)]
    if strange and "SLURM_STEP_ID" not in around.variables:
        diagnosis.warnings.append(
            f"{', '.join(strange)}: left by another launcher; train and submit take none of it"
        )
    if pins := [name for name in around.variables if pins_threads(name)]:
        diagnosis.warnings.append(
            f"{', '.join(pins)}: would bind the threads of all ranks to the same cores; train "
            "leaves it out for several ranks, submit always"
        )
    if (tmp := os.environ.get("TMPDIR")) and not os.access(tmp, os.W_OK):
        diagnosis.warnings.append(f"TMPDIR={tmp} is no folder that can be written; unset it")


def _examine_torch(diagnosis: Diagnosis) -> bool:
    """Record torch and its devices; true where CUDA can be used."""
    if _version("torch") is None:
        diagnosis.found["torch"] = "not installed"
        diagnosis.warnings.append("torch is missing; nothing can be trained: pip install torch")
        return False
    import torch

    diagnosis.found["torch"] = torch.__version__
    if not torch.cuda.is_available():
        diagnosis.found["cuda"] = "no device; models run on the CPU with gloo"
        return False
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    named = ", ".join(f"{device.name} ({format_bytes(device.total_memory)})" for device in devices)
    diagnosis.found["cuda"] = f"{torch.version.cuda}: {named}"
    return True


def _examine_megatron_core(diagnosis: Diagnosis) -> None:
    found = _version("megatron-core")
    diagnosis.found["megatron-core"] = found or "not installed"
    if found is None or not found.startswith(SUPPORTED_MEGATRON_CORE):
        diagnosis.warnings.append(
            f"megatron-core is {found or 'missing'}; this package is tested with "
            f"{SUPPORTED_MEGATRON_CORE}x: pip install 'megatron-core>=0.16.1,<0.17'"
        )


def _examine_transformer_engine(diagnosis: Diagnosis, *, has_cuda: bool) -> None:
    found = _version("transformer-engine")
    if found is None:
        diagnosis.found["transformer-engine"] = "not installed (extra: te); our own modules serve"
    elif has_cuda:
        diagnosis.found["transformer-engine"] = found
    else:
        diagnosis.found["transformer-engine"] = f"{found}, not used: it needs a CUDA device"


def _examine_apex(diagnosis: Diagnosis) -> None:
    """NVIDIA's Apex has ``apex.normalization``; the package of that name on PyPI does not."""
    module = find_spec("apex")
    folders = list(module.submodule_search_locations or ()) if module else []
    is_nvidias = any((Path(folder) / "normalization").is_dir() for folder in folders)
    found = _version("apex")
    if module is None and found is None:
        diagnosis.found["apex"] = "not installed; our own norm serves"
    elif is_nvidias:
        compiled = find_spec("fused_layer_norm_cuda") is not None
        diagnosis.found["apex"] = f"{found or 'unversioned'}, NVIDIA's"
        if not compiled:
            diagnosis.found["apex"] += ", without its compiled norms: not used"
    else:
        diagnosis.found["apex"] = f"{found or 'unversioned'}, an unrelated project"
        diagnosis.warnings.append(
            "the installed package named apex is an unrelated project, not NVIDIA's Apex: "
            "pip uninstall apex, and build NVIDIA's from its own repository if you want it"
        )


def _examine_psutil(diagnosis: Diagnosis) -> None:
    found = _version("psutil")
    diagnosis.found["psutil"] = found or "not installed"
    if found is None:
        diagnosis.warnings.append(
            "psutil is missing and megatron-core's checkpoint writer hangs without it: "
            "pip install psutil"
        )


def _slurm() -> str:
    sbatch = shutil.which("sbatch")
    if sbatch is None:
        return "no sbatch on PATH; runs start on this machine only"
    try:
        answer = subprocess.run(
            [sbatch, "--version"],
            capture_output=True,
            text=True,
            timeout=SLURM_TIMEOUT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        return f"{sbatch}, which does not answer: {error}"
    return f"{answer.stdout.strip()} ({sbatch})"


def _examine_recipe(diagnosis: Diagnosis, recipe: Recipe) -> None:
    parallel = recipe.parallel
    size = (
        parallel.tensor_model_parallel_size
        * parallel.pipeline_model_parallel_size
        * parallel.context_parallel_size
    )
    diagnosis.found["ranks"] = f"{size} hold one model; start {size} or a multiple of it"
    if not Path(recipe.data.tokenizer).exists():
        diagnosis.warnings.append(
            f"data.tokenizer: {recipe.data.tokenizer} does not exist here; "
            f"train one with: megatron-curr train-tokenizer"
        )
    if _version("torch") is None or _version("megatron-core") is None:
        return
    from megatron_curr.models.backend import describe_backend

    diagnosis.modules = describe_backend(
        isolate_documents=recipe.data.isolate_documents,
        has_experts=recipe.model.num_moe_experts is not None,
    )
