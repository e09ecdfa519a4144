"""A command line under mpirun of which one rank dies of SIGKILL: ``python -m tests.faults.dying_rank RANK CALL COUNT WORDS...``.

It dies before its COUNT-th call of ``os.CALL`` that concerns a rank file or the journal.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from arctic_trt.launch import find_launch


def main() -> None:
    rank, call, count = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    launch = find_launch(os.environ)
    if launch and launch.rank == rank:
        original, seen = getattr(os, call), 0

        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal seen
            seen += 1
            if seen == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(os, call, counted)
    from arctic_trt.cli.main import main as arctic_trt

    arctic_trt(sys.argv[4:])


main()
