"""Packaging. Ranges live here; the exact versions that are tested live in constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "(.+)"$', (ROOT / "megatron_curr/__init__.py").read_text(), re.MULTILINE
)[1]

setup(
    name="megatron-curr",
    version=VERSION,
    description="Pretraining on Megatron-Core, fed by one staged curriculum of consumed tokens",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    # The recipes stay at the top of the repository, where people look for them, and are installed
    # as the data package megatron_curr.configs: megatron_curr/recipe/shipped.py finds both.
    packages=[
        *find_packages(include=["megatron_curr*", "launch*", "data_tools*"]),
        "megatron_curr.configs",
        "launch.slurm.templates",  # found by launch/slurm/script.py
    ],
    package_dir={"megatron_curr.configs": "configs", "launch.slurm.templates": "slurm"},
    package_data={
        "megatron_curr": ["py.typed"],
        "megatron_curr.configs": ["*.yaml", "clusters/*.yaml"],
        "launch.slurm.templates": ["*.sbatch"],
        "megatron_curr.plan": ["*.yaml"],
        "megatron_curr.recipe": ["*.yaml"],
        "megatron_curr.report": ["*.j2", "*.js", "*.css"],
        "megatron_curr.convert": ["*.j2"],
        "megatron_curr.sample": ["*.yaml"],
    },
    include_package_data=False,
    install_requires=[
        "av>=15",
        "backports.zstd>=1.0; python_version < '3.14'",
        "huggingface_hub>=0.34",
        "jinja2>=3.1",
        "megatron-core>=0.16.1,<0.17",
        "numpy>=1.26,<3",
        "orjson>=3.10",
        "packaging>=24",
        "pillow>=10",
        "protobuf>=5",  # what a SentencePiece model says of itself
        "pyarrow>=17",
        "psutil>=6",  # megatron-core's checkpoint writer hangs without it
        "pydantic>=2.9,<3",
        "PyYAML>=6",
        "rich>=13.7",
        "safetensors>=0.5",
        "sentencepiece>=0.2",
        "tiktoken>=0.8",
        "tokenizers>=0.21",
        "torch>=2.7,<3",
        "transformers>=4.56,<6",
        "typer>=0.15",
    ],
    extras_require={
        "fast": ["fastokens>=0.3.5", "gigatoken>=0.10"],
        "te": ["transformer-engine[pytorch]>=2.4"],
        "dali": ["nvidia-dali-cuda120>=2.4"],
        "video": ["diffusers>=0.34"],
        "tensorboard": ["tensorboard>=2.18"],
        "wandb": ["wandb>=0.19"],
        "dev": [
            "codespell>=2.4",
            "diffusers>=0.34",
            "fastokens>=0.3.5",
            "gigatoken>=0.10",
            "hypothesis>=6.100",
            "jsonschema>=4.23",
            "mypy>=1.15",
            "pytest>=8.3",
            "pytest-xdist>=3.6",
            "ruff>=0.12",
            "tensorboard>=2.18",
            "types-PyYAML>=6",
            "wandb>=0.19",
        ],
    },
    entry_points={"console_scripts": ["megatron-curr = megatron_curr.cli:main"]},
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
