"""``arctic-trt run`` with a fault: ``python -m tests.support.faulty_run FAULT RANK ARGUMENTS...``, started under mpirun.

Before its third step the given rank raises (``raise``), dies (``die``), or, for tests that kill from outside, writes its and
its launcher's process ids to ``$PIDS/RANK`` (``report``; every rank does) and from then on takes its time.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from arctic_trt.runtime.worker import Worker


def main() -> None:
    fault, rank, arguments = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
    execute, steps = Worker.execute, 0

    def faulty(worker: Worker, step: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps > 2 and worker.network.rank.index == rank and fault == "raise":
            raise ValueError("the fault of this test")
        if steps > 2 and worker.network.rank.index == rank and fault == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "report":
            pids = Path(os.environ["PIDS"], str(worker.network.rank.index))
            if not pids.exists():
                pids.with_suffix(".partial").write_text(f"{os.getpid()} {os.getppid()}")
                pids.with_suffix(".partial").rename(pids)
            time.sleep(0.2)
        return execute(worker, step)

    Worker.execute = faulty  # type: ignore[method-assign]
    from arctic_trt.cli.main import main as arctic_trt

    arctic_trt(arguments)


main()
