"""``python -m tests.support.few_tasks MODULE ARGUMENTS...``: a main program, with a harness that has no tasks of its own.

To read its 14,000 task files takes the harness longer than all that is tested with it.
"""

from __future__ import annotations

import functools
import runpy
import sys

from arctic_trt.launch import is_leader


def main() -> None:
    if is_leader():  # the other ranks never ask for tasks
        from lm_eval.tasks import TaskManager

        TaskManager.__init__ = functools.partialmethod(TaskManager.__init__, include_defaults=False)  # type: ignore[assignment]
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


main()
