"""The processes that models live in. A server whose stub has died keeps saying that it is ready, and never starts another."""

from __future__ import annotations

import logging
import re
import threading
import time
from contextlib import suppress
from pathlib import Path

from arctic_trt.errors import ArcticTrtError
from arctic_trt.triton.admin import Admin
from arctic_trt.triton.names import GATE
from arctic_trt.triton.server import STUB

LOOK_S = 0.5
UNLOAD_S = 5.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0
MODEL = re.compile(r"/(\w+)/\d+/model\.py")
PROC = Path("/proc")

logger = logging.getLogger(__name__)


def find_stubs(server: int) -> dict[str, int]:
    """The living stubs of the server with the process id ``server``: process ids by the models that they hold."""
    stubs = {}
    for path in PROC.glob("[0-9]*"):
        with suppress(OSError):  # gone meanwhile
            state, parent = (path / "stat").read_text().rpartition(")")[2].split()[:2]
            words = (path / "cmdline").read_bytes().decode(errors="replace")
            model = MODEL.search(words)
            if int(parent) == server and state != "Z" and STUB in words and model:
                stubs[model[1]] = int(path.name)
    return stubs


class Reviver(threading.Thread):
    """Loads models again whose stubs die from now on. :meth:`stop` it before the server is told to end.

    A model is not unloaded before its requests have ended, which those that a dead stub had taken never do: then it
    :attr:`gave_up`, and only another server helps.
    """

    def __init__(self, server: int, admin: Admin) -> None:
        super().__init__(name="reviver", daemon=True)
        self._server, self._admin = server, admin
        self.revived = 0
        """Models that were loaded again. Requests that their processes had taken are never answered, and the server knows."""
        self.gave_up = threading.Event()
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Revive nothing any more."""
        self._stopped.set()

    def run(self) -> None:
        # the gate comes and goes: that is how the ranks' leader says whether the server is ready
        models, pause_s = find_stubs(self._server).keys() - {GATE}, FIRST_PAUSE_S
        while not self._stopped.wait(LOOK_S) and not self.gave_up.is_set():
            dead = sorted(models - find_stubs(self._server).keys())
            if self._stopped.is_set() or not dead:
                continue
            pause_s = FIRST_PAUSE_S if all(map(self._revive, dead)) else min(2 * pause_s, LONGEST_PAUSE_S)
            self._stopped.wait(pause_s)

    def _revive(self, model: str) -> bool:
        """Whether ``model`` is loaded again."""
        logger.warning("The process of the model %s has died; loading it again.", model)
        try:
            self._admin.unload(model)
            if not self._is_gone(model):
                self.gave_up.set()
                return False
            self._admin.load(model)
        except ArcticTrtError as error:
            if not self._stopped.is_set():
                logger.error("%s", error)
            return False
        self.revived += 1
        logger.info("The model %s is loaded again.", model)
        return True

    def _is_gone(self, model: str) -> bool:
        """Whether ``model`` is unloaded before long."""
        until = time.monotonic() + UNLOAD_S
        while model in self._admin.loaded():
            if time.monotonic() > until or self._stopped.wait(LOOK_S):
                return False
        return True
