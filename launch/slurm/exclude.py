"""Which nodes a job is kept away from."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence

from launch.slurm import client
from launch.slurm.policy import Rules, excluded_nodes
from launch.slurm.submission import Submission
from megatron_curr.incarnation.record import Record


def nodes_to_exclude(submission: Submission, records: Sequence[Record]) -> list[str]:
    """Of the nodes that failed lately, the last ones, as many as the partition can do without."""
    rules = Rules(submission.max_fruitless, submission.exclude_s)
    failed = list(excluded_nodes(records, rules, now_s=time.time()))
    if not failed:
        return []
    usable = client.usable_nodes(partition=submission.partition)
    can_miss = max(len(usable) - submission.num_nodes - submission.spares, 0)
    unusable = [node for node in failed if node not in usable]  # to leave these out costs nothing
    newest_first = [node for node in reversed(failed) if node in usable]
    return sorted({*unusable, *newest_first[:can_miss], *_excluded_by_profile(submission)})


def _excluded_by_profile(submission: Submission) -> list[str]:
    """An option of sbatch takes the place of the script's own, which therefore has to be in it."""
    script = submission.script.read_text(encoding="utf-8")
    own = re.findall(r"^#SBATCH --exclude=(\S+)", script, re.MULTILINE)
    return [node for node_list in own for node in client.hostnames(node_list)]
