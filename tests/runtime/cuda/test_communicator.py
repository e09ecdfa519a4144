"""The communicator of GPUs, over another library than theirs."""

from __future__ import annotations

import pytest

from tests.support.engines import mpirun

pytestmark = pytest.mark.mpi


def test_ranks_of_two_stages_understand_each_other() -> None:
    job = mpirun(4, "-m", "mpi4py", "-m", "tests.support.device_ranks")
    assert job.code == 0 and job.out.strip() == "all agree", job.err
