"""One rank in this process, and a small video transformer on it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.distributed as dist

from megatron_curr.models.video_dit import VideoDiT
from megatron_curr.parallel.groups import Groups, build_groups, destroy_groups
from tests.models.videos import Videos, build_dit, videos
from tests.parallel.layouts import layout


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Groups]:
    store = tmp_path_factory.mktemp("store") / "file"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield build_groups(layout())
    destroy_groups()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def dit(groups: Groups) -> VideoDiT:
    return build_dit(groups)


@pytest.fixture(scope="module")
def batch(dit: VideoDiT) -> Videos:
    return videos(dit.model, 3, 4, 6)
