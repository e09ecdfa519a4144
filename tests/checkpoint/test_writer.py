"""The rank files of a checkpoint: what an earlier run wrote is taken as written, and nothing else is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from arctic_trt.checkpoint.contract import QuantFormat
from arctic_trt.checkpoint.writer import RankFiles
from arctic_trt.model.config import parse_config
from arctic_trt.model.mapping import plan_mapping
from arctic_trt.model.names import EMBEDDING
from tests.support.checkpoints import TINY

CONFIG = parse_config({**TINY, "num_hidden_layers": 5})
QUANT = QuantFormat(fp8=True, kv_fp8=True)


def rank_files(path: Path, *, resume: bool = False, tp_size: int = 2, pp_size: int = 2) -> RankFiles:
    return RankFiles(path, CONFIG, plan_mapping(CONFIG, tp_size=tp_size, pp_size=pp_size), QUANT, resume=resume)


@pytest.mark.parametrize(("count", "local"), [(0, [0, 0]), (1, [1, 0]), (3, [3, 0]), (4, [3, 1]), (5, [3, 2])])
def test_layers_of_an_earlier_run_are_taken_as_written(count: int, local: list[int], tmp_path: Path) -> None:
    """Layers count from zero in each pipeline stage."""
    files = rank_files(tmp_path)
    files.assume_layers(count)
    for rank, written in enumerate(files.written()):
        layers = {name.split(".")[2] for name in written if ".layers." in name}
        assert layers == {str(layer) for layer in range(local[rank // 2])}
        assert len([name for name in written if ".layers." in name]) == 26 * len(layers)
        assert (EMBEDDING.trt in written) is (rank < 2)
        assert "lm_head.weight" not in written
    files.close()


def test_more_than_nine_layers_do_not_confuse(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"num_hidden_layers": 12})
    files = RankFiles(tmp_path, config, plan_mapping(config, tp_size=1), QUANT)
    files.assume_layers(2)
    [written] = files.written()
    assert {name.split(".")[2] for name in written if ".layers." in name} == {"0", "1"}
    files.close()


def test_a_layer_is_synced_where_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = rank_files(tmp_path)
    synced: list[str] = []
    monkeypatch.setattr(os, "fdatasync", lambda fd: synced.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name))
    for layer, ranks in ((0, (0, 1)), (2, (0, 1)), (3, (2, 3)), (None, (0, 1, 2, 3))):
        synced.clear()
        files.sync(layer)
        assert synced == [f"rank{rank}.safetensors.partial" for rank in ranks]
    files.close()


def test_parts_of_several_processes_add_up(tmp_path: Path) -> None:
    """One writes the odd tensors, another the even ones; only together the files are whole."""
    one, other = rank_files(tmp_path, tp_size=1, pp_size=1), rank_files(tmp_path, resume=True, tp_size=1, pp_size=1)
    layout = one._files[0].layout
    for number, (name, spec) in enumerate(layout.specs.items()):
        dtype = {"F8_E4M3": torch.float8_e4m3fn, "BF16": torch.bfloat16, "F32": torch.float32}[spec.dtype]
        (one, other)[number % 2]._files[0].write(name, torch.zeros(spec.shape).to(dtype))
    assert one.bytes_written + other.bytes_written == layout.total_bytes
    with pytest.raises(RuntimeError, match=r"rank0\.safetensors: .* has 0 of"):
        one.finish([one.written()])
    one.finish([one.written(), other.written()])
    other.close()
    assert [path.name for path in tmp_path.iterdir()] == ["rank0.safetensors"]
