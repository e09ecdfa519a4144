"""Progress: a live line on a terminal, one plain line a layer in a log, with the same figures."""

from __future__ import annotations

import threading
import time

import pytest

from arctic_trt.cli import progress
from arctic_trt.cli.options import join_job
from arctic_trt.cli.progress import LayerProgress, layer_line, live_line, rate
from arctic_trt.launch import RANK_KEYS, SIZE_KEYS
from arctic_trt.output import Output
from arctic_trt.quantize.layer_pass import LayerSummary


class Meter:
    """Half way through the eleventh of 35 layers, resumed after the first."""

    num_layers, layer, expert = 35, 10, 63
    seconds, bytes_read, bytes_written = 20.0, 22_000_000_000, 11_000_000_000

    @staticmethod
    def peak_rss_bytes() -> int:
        return 3_100_000_000

    def seconds_left(self, layer: int) -> float:
        return 2.0 * (self.num_layers - layer - 1)


METER: object = Meter()


def test_a_rate_says_how_much_and_how_fast() -> None:
    assert rate(25_900_000_000, 20.0) == "25.90 GB at 1.29 GB/s"


def test_the_live_line_says_where_it_is() -> None:
    assert live_line(METER, 128) == (  # type: ignore[arg-type]
        "layer 11/35  expert 64/128  read 22.00 GB at 1.10 GB/s  written 11.00 GB at 550.00 MB/s  rss 3.10 GB"
    )


@pytest.mark.parametrize(
    ("tokens", "experts"), [((9, 0, 4), "  experts 2/3 (min 0 tok)"), ((9, 5), "  experts 2/2 (min 5 tok)"), ((), "")]
)
def test_a_finished_layer_is_one_line(tokens: tuple[int, ...], experts: str) -> None:
    assert layer_line(LayerSummary(10, tokens, {}, {}), METER) == (  # type: ignore[arg-type]
        f"layer 11/35  read 22.00 GB at 1.10 GB/s  written 11.00 GB at 550.00 MB/s{experts}  rss 3.10 GB  eta 48.0 s"
    )


def refreshers() -> int:
    return sum(thread.daemon and "_refresh" in thread.name for thread in threading.enumerate())


def test_in_a_log_nothing_is_redrawn(capsys: pytest.CaptureFixture[str]) -> None:
    before = refreshers()
    with LayerProgress(Output(), 4) as shown:
        shown.begin(METER)  # type: ignore[arg-type]
        assert refreshers() == before
        shown.layer_done(LayerSummary(10, (1,), {}, {}), METER)  # type: ignore[arg-type]
    err = capsys.readouterr().err
    assert err.startswith("layer 11/35  read") and err.count("\n") == 1 and "\x1b" not in err


@pytest.mark.parametrize("fail", [False, True])
def test_on_a_terminal_a_line_lives_as_long_as_the_pass(fail: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Output, "terminal", True)
    monkeypatch.setattr(progress, "REFRESH_S", 0.001)
    drawn = threading.Event()
    line = progress.live_line

    def draw(*args: object) -> str:
        drawn.set()
        return line(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(progress, "live_line", draw)
    before = refreshers()

    def work() -> None:
        with LayerProgress(Output(), 4) as shown:
            time.sleep(0.01)
            assert not drawn.is_set(), "nothing to tell before the pass has begun"
            shown.begin(METER)  # type: ignore[arg-type]
            assert drawn.wait(20)
            if fail:
                raise KeyboardInterrupt

    if fail:
        with pytest.raises(KeyboardInterrupt):
            work()
    else:
        work()
    assert refreshers() == before


def test_under_mpirun_one_rank_speaks_and_draws_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Open MPI gives its ranks a terminal, wherever their output goes."""
    for name in (*RANK_KEYS, *SIZE_KEYS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setattr("arctic_trt.cli.options.tie_to_launcher", lambda: None)
    assert join_job(alone := Output()) is None and alone.terminal
    for rank in (0, 1):
        monkeypatch.setenv("OMPI_COMM_WORLD_RANK", str(rank))
        monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
        launch = join_job(output := Output())
        assert launch is not None and launch.rank == rank
        assert not output.terminal and output.quiet is (rank > 0)
