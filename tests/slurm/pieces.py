"""Submits an array of four pieces, of which one fails until a file is there."""

from __future__ import annotations

import sys
from pathlib import Path

from launch.slurm.array import submit_array
from launch.slurm.profile import load_profile

if __name__ == "__main__":
    profile, folder = load_profile(sys.argv[1]).values, Path(sys.argv[2])
    needs = [
        f"[[ {index} != 2 || -e {folder}/mended ]] && echo piece {index}" for index in range(4)
    ]
    commands = [["bash", "-c", line] for line in needs]
    print(submit_array(commands, profile, folder=folder, name="pieces", at_once=2) or "")
