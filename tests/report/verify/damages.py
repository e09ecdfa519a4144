"""Ways in which a checkpoint goes wrong, each done to a copy: 4 ranks, 2 of them for each half of the experts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]
Damage = Callable[[Path, Path], None]
DAMAGES: dict[str, Damage] = {}
LAYER0, LAYER1 = "transformer.layers.0.", "transformer.layers.1."
RANKS, HEAD_DIM, Q_ROWS, KV_ROWS = 4, 8, 32, 16


def damage(name: str) -> Callable[[Damage], Damage]:
    def register(function: Damage) -> Damage:
        assert name not in DAMAGES
        DAMAGES[name] = function
        return function

    return register


def rank_path(directory: Path, rank: int) -> Path:
    return directory / f"rank{rank}.safetensors"


def edit(directory: Path, change: Callable[[Tensors], object], ranks: range | list[int] = range(RANKS)) -> None:
    for rank in ranks:
        tensors = load_file(rank_path(directory, rank))
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, rank_path(directory, rank))


def edit_config(directory: Path, change: Callable[[dict[str, object]], object]) -> None:
    edit_json(directory / "config.json", change)


def edit_report(directory: Path, change: Callable[[dict[str, object]], object]) -> None:
    edit_json(directory / "report" / "quantize.json", change)


def edit_json(path: Path, change: Callable[[dict[str, object]], object]) -> None:
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


def swap(tensors: Tensors, a: str, b: str) -> None:
    tensors[a], tensors[b] = tensors[b], tensors[a]


def put(tensors: Tensors, name: str, value: Tensor) -> None:
    tensors[name] = value


def flip(tensor: Tensor, byte: int, bit: int) -> Tensor:
    flat = tensor.contiguous().clone().view(-1).view(torch.uint8)
    flat[byte] ^= 1 << bit
    return flat.view(tensor.dtype).view(tensor.shape)


def exchange_rows(tensor: Tensor, a: slice, b: slice) -> Tensor:
    bytes_, out = tensor.view(torch.uint8), tensor.clone().view(torch.uint8)
    out[a], out[b] = bytes_[b], bytes_[a]
    return out.view(tensor.dtype)


@damage("w1 and w3 of an expert swapped")
def _(out: Path, other: Path) -> None:
    def change(t: Tensors) -> None:
        fc = t[LAYER0 + "mlp.fc.weight"]
        half = fc.shape[1] // 2
        fc.view(torch.uint8)[1] = torch.cat([fc.view(torch.uint8)[1, half:], fc.view(torch.uint8)[1, :half]])

    edit(out, change)


@damage("residual w1 and w3 swapped")
def _(out: Path, other: Path) -> None:
    edit(out, lambda t: swap(t, LAYER0 + "residual_mlp.fc.weight", LAYER0 + "residual_mlp.gate.weight"))


@damage("two experts permuted, scales with them")
def _(out: Path, other: Path) -> None:
    def change(t: Tensors) -> None:
        for part in ("fc", "proj"):
            for leaf in ("weight", "weights_scaling_factor"):
                name = f"{LAYER1}mlp.{part}.{leaf}"
                t[name] = exchange_rows(t[name], slice(0, 1), slice(1, 2))

    edit(out, change)


@damage("a shard transposed")
def _(out: Path, other: Path) -> None:
    def change(t: Tensors) -> None:
        name = LAYER0 + "attention.dense.weight"
        t[name] = t[name].view(torch.uint8).t().contiguous().view(t[name].shape).view(t[name].dtype)

    edit(out, change, [2])


@damage("activation scale of another layer")
def _(out: Path, other: Path) -> None:
    leaf = "attention.dense.activation_scaling_factor"
    edit(out, lambda t: swap(t, LAYER0 + leaf, LAYER1 + leaf))


@damage("weight scale of another layer")
def _(out: Path, other: Path) -> None:
    edit(out, lambda t: swap(t, LAYER0 + "attention.qkv.weights_scaling_factor", LAYER1 + "attention.qkv.weights_scaling_factor"))


@damage("weight scale of another expert")
def _(out: Path, other: Path) -> None:
    name = LAYER0 + "mlp.proj.weights_scaling_factor"
    edit(out, lambda t: put(t, name, exchange_rows(t[name], slice(0, 1), slice(1, 2))))


@damage("an expert's scale left at 1.0")
def _(out: Path, other: Path) -> None:
    edit(out, lambda t: t[LAYER0 + "mlp.fc.weights_scaling_factor"].view(-1)[0].fill_(1.0))


@damage("a rank of another run")
def _(out: Path, other: Path) -> None:
    shutil.copy(rank_path(other, 1), rank_path(out, 1))


@damage("rank files exchanged")
def _(out: Path, other: Path) -> None:
    saved = rank_path(out, 0).read_bytes()
    shutil.copy(rank_path(out, 2), rank_path(out, 0))
    rank_path(out, 2).write_bytes(saved)


@damage("KV scale missing")
def _(out: Path, other: Path) -> None:
    edit(out, lambda t: t.pop(LAYER1 + "attention.kv_cache_scaling_factor"))


@damage("KV scale changed")
def _(out: Path, other: Path) -> None:
    edit(out, lambda t: t[LAYER1 + "attention.kv_cache_scaling_factor"].mul_(1.5))


@damage("one bit of a matrix")
def _(out: Path, other: Path) -> None:
    edit(out, lambda t: put(t, LAYER1 + "mlp.proj.weight", flip(t[LAYER1 + "mlp.proj.weight"], 77, 0)), [3])


@damage("one bit of a scale, on one rank")
def _(out: Path, other: Path) -> None:
    name = LAYER0 + "mlp.fc.activation_scaling_factor"
    edit(out, lambda t: put(t, name, flip(t[name], 0, 0)), [1])


@damage("one bit of a scale, on all ranks")
def _(out: Path, other: Path) -> None:
    name = LAYER0 + "mlp.fc.activation_scaling_factor"
    edit(out, lambda t: put(t, name, flip(t[name], 0, 0)))


@damage("one bit of a norm, on all ranks")
def _(out: Path, other: Path) -> None:
    name = LAYER0 + "post_layernorm.weight"
    edit(out, lambda t: put(t, name, flip(t[name], 4, 3)))


@damage("a norm on one rank")
def _(out: Path, other: Path) -> None:
    edit(out, lambda t: t[LAYER1 + "input_layernorm.weight"].mul_(2), [3])


@damage("norms of a layer exchanged")
def _(out: Path, other: Path) -> None:
    edit(out, lambda t: swap(t, LAYER0 + "input_layernorm.weight", LAYER0 + "post_layernorm.weight"))


@damage("a NaN byte")
def _(out: Path, other: Path) -> None:
    edit(out, lambda t: t[LAYER0 + "mlp.fc.weight"].view(torch.uint8).view(-1)[5:6].fill_(0x7F), [0])


@damage("a negative NaN byte")
def _(out: Path, other: Path) -> None:
    edit(out, lambda t: t[LAYER1 + "attention.qkv.weight"].view(torch.uint8).view(-1)[5:6].fill_(0xFF), [2])


@damage("infinity in the embedding")
def _(out: Path, other: Path) -> None:
    edit(out, lambda t: t["transformer.vocab_embedding.weight"].view(-1)[3:4].fill_(float("inf")), [2])


@damage("a matrix of zeros")
def _(out: Path, other: Path) -> None:
    edit(out, lambda t: t[LAYER0 + "mlp.proj.weight"][1].view(torch.uint8).zero_(), [1])


@damage("a file cut short")
def _(out: Path, other: Path) -> None:
    rank_path(out, 1).write_bytes(rank_path(out, 1).read_bytes()[:-7])


@damage("an empty file")
def _(out: Path, other: Path) -> None:
    rank_path(out, 1).write_bytes(b"")


@damage("a file missing")
def _(out: Path, other: Path) -> None:
    rank_path(out, 3).unlink()


@damage("a file too many")
def _(out: Path, other: Path) -> None:
    shutil.copy(rank_path(out, 3), rank_path(out, 4))


@damage("a tensor too many")
def _(out: Path, other: Path) -> None:
    edit(out, lambda t: put(t, "transformer.layers.2.input_layernorm.weight", torch.ones(4)), [0])


@damage("a shape")
def _(out: Path, other: Path) -> None:
    name = LAYER0 + "mlp.fc.weights_scaling_factor"
    edit(out, lambda t: put(t, name, t[name].view(-1)), [0])


@damage("router stored in bf16")
def _(out: Path, other: Path) -> None:
    edit(out, lambda t: put(t, LAYER0 + "mlp.router.weight", t[LAYER0 + "mlp.router.weight"].bfloat16()))


@damage("router rounded to e4m3")
def _(out: Path, other: Path) -> None:
    name = LAYER0 + "mlp.router.weight"
    edit(out, lambda t: put(t, name, t[name].to(torch.float8_e4m3fn).float()))


@damage("codes stored as int8")
def _(out: Path, other: Path) -> None:
    edit(out, lambda t: put(t, LAYER0 + "attention.qkv.weight", t[LAYER0 + "attention.qkv.weight"].view(torch.int8)), [0])


@damage("q heads permuted")
def _(out: Path, other: Path) -> None:
    name = LAYER0 + "attention.qkv.weight"
    edit(out, lambda t: put(t, name, exchange_rows(t[name], slice(0, HEAD_DIM), slice(HEAD_DIM, 2 * HEAD_DIM))))


@damage("k and v exchanged")
def _(out: Path, other: Path) -> None:
    name, k, v = LAYER0 + "attention.qkv.weight", slice(Q_ROWS, Q_ROWS + KV_ROWS), slice(Q_ROWS + KV_ROWS, Q_ROWS + 2 * KV_ROWS)
    edit(out, lambda t: put(t, name, exchange_rows(t[name], k, v)))


@damage("signs of a matrix flipped")
def _(out: Path, other: Path) -> None:
    edit(out, lambda t: t[LAYER1 + "residual_mlp.proj.weight"].view(torch.uint8).bitwise_xor_(0x80), [1])


@damage("codes cast towards zero")
def _(out: Path, other: Path) -> None:
    def change(t: Tensors) -> None:
        codes = t[LAYER1 + "residual_mlp.fc.weight"].view(torch.uint8)
        codes.sub_(((codes & 0x7F) > 8).to(torch.uint8) * (torch.arange(codes.numel()).view(codes.shape) % 2).to(torch.uint8))

    edit(out, change)


@damage("layers exchanged")
def _(out: Path, other: Path) -> None:
    def change(t: Tensors) -> None:
        for name in [name for name in t if name.startswith(LAYER0)]:
            swap(t, name, LAYER1 + name.removeprefix(LAYER0))

    edit(out, change)


@damage("embedding rows exchanged")
def _(out: Path, other: Path) -> None:
    name = "transformer.vocab_embedding.weight"
    edit(out, lambda t: put(t, name, t[name][torch.randperm(len(t[name]), generator=torch.Generator().manual_seed(0))]), [1])


@damage("embedding as output head")
def _(out: Path, other: Path) -> None:
    edit(out, lambda t: put(t, "lm_head.weight", t["transformer.vocab_embedding.weight"].clone()))


@damage("fc and gate with scales of their own")
def _(out: Path, other: Path) -> None:
    edit(out, lambda t: t[LAYER0 + "residual_mlp.gate.weights_scaling_factor"].mul_(1.25))


@damage("a scale of zero in one of two layers")
def _(out: Path, other: Path) -> None:
    edit(out, lambda t: t[LAYER0 + "attention.qkv.activation_scaling_factor"].zero_())


@damage("config cut short")
def _(out: Path, other: Path) -> None:
    (out / "config.json").write_text('{"architecture": ')


@damage("a site missing in the report")
def _(out: Path, other: Path) -> None:
    path = out / "report" / "quantize.json"
    path.write_text(path.read_text().replace("attention.dense.activation", "attention.dance.activation"))


@damage("a file that was never finished")
def _(out: Path, other: Path) -> None:
    (out / "rank0.safetensors.partial").write_bytes(b"x")


@damage("a scale of zero")
def _(out: Path, other: Path) -> None:
    edit(out, lambda t: t[LAYER0 + "mlp.fc.weights_scaling_factor"].view(-1)[1:2].zero_())


@damage("a scale that is NaN")
def _(out: Path, other: Path) -> None:
    edit(out, lambda t: t[LAYER0 + "attention.dense.activation_scaling_factor"].fill_(float("nan")))


@damage("a scale eight times too small")
def _(out: Path, other: Path) -> None:
    edit(out, lambda t: t[LAYER1 + "mlp.fc.activation_scaling_factor"].div_(8))


@damage("config of another top_k")
def _(out: Path, other: Path) -> None:
    edit_config(out, lambda raw: raw["moe"].update(top_k=1))  # type: ignore[attr-defined]


@damage("config of another rope base")
def _(out: Path, other: Path) -> None:
    edit_config(out, lambda raw: raw.update(rotary_base=500000.0))


@damage("config without residual_mlp")
def _(out: Path, other: Path) -> None:
    edit_config(out, lambda raw: raw.pop("residual_mlp"))


@damage("config of another activation")
def _(out: Path, other: Path) -> None:
    edit_config(out, lambda raw: raw.update(hidden_act="silu"))


@damage("config of twice the ranks")
def _(out: Path, other: Path) -> None:
    edit_config(out, lambda raw: raw["mapping"].update(world_size=8, tp_size=8, moe_tp_size=4))  # type: ignore[attr-defined]


@damage("config for a bf16 cache")
def _(out: Path, other: Path) -> None:
    edit_config(out, lambda raw: raw["quantization"].update(kv_cache_quant_algo=None))  # type: ignore[attr-defined]


@damage("config that excludes a quantized module")
def _(out: Path, other: Path) -> None:
    edit_config(out, lambda raw: raw["quantization"]["exclude_modules"].append(f"{LAYER1}mlp"))  # type: ignore[index]


@damage("config that leaves out the routers")
def _(out: Path, other: Path) -> None:
    edit_config(out, lambda raw: raw["quantization"]["exclude_modules"].remove("*router"))  # type: ignore[index]


@damage("config missing")
def _(out: Path, other: Path) -> None:
    (out / "config.json").unlink()


@damage("marker of unfinished work")
def _(out: Path, other: Path) -> None:
    (out / ".arctic-trt-unfinished").write_text("{}")


@damage("experts permuted with their scales and router rows")
def _(out: Path, other: Path) -> None:
    def change(t: Tensors) -> None:
        for part in ("fc", "proj"):
            for leaf in ("weight", "weights_scaling_factor"):
                name = f"{LAYER1}mlp.{part}.{leaf}"
                t[name] = exchange_rows(t[name], slice(0, 1), slice(1, 2))
        router = f"{LAYER1}mlp.router.weight"
        t[router] = t[router][torch.tensor([1, 0, 2, 3, 5, 4, 6, 7])]  # each half of the experts has its first two exchanged

    edit(out, change)


@damage("router rows permuted")
def _(out: Path, other: Path) -> None:
    edit(out, lambda t: put(t, LAYER0 + "mlp.router.weight", t[LAYER0 + "mlp.router.weight"].flip(0)))


@damage("one bit of an expert's scale")
def _(out: Path, other: Path) -> None:
    name = LAYER1 + "mlp.fc.weights_scaling_factor"
    edit(out, lambda t: put(t, name, flip(t[name], 4, 3)), [0, 2])


@damage("an expert's scale one float32 step off")
def _(out: Path, other: Path) -> None:
    name = LAYER1 + "mlp.fc.weights_scaling_factor"
    edit(out, lambda t: put(t, name, flip(t[name], 4, 0)), [0, 2])


@damage("scales doubled and codes halved")
def _(out: Path, other: Path) -> None:
    def change(t: Tensors) -> None:
        name = LAYER0 + "attention.qkv."
        t[name + "weights_scaling_factor"] *= 2
        t[name + "weight"] = (t[name + "weight"].float() / 2).to(torch.float8_e4m3fn)

    edit(out, change)


@damage("zeros that became negative")
def _(out: Path, other: Path) -> None:
    def change(t: Tensors) -> None:
        for codes in (tensor.view(torch.uint8) for tensor in t.values() if tensor.dtype == torch.float8_e4m3fn):
            codes[codes == 0] = 0x80

    before = [rank_path(out, rank).read_bytes() for rank in range(RANKS)]
    edit(out, change)
    assert before != [rank_path(out, rank).read_bytes() for rank in range(RANKS)], "there are zeros"


@damage("two bytes exchanged")
def _(out: Path, other: Path) -> None:
    def change(t: Tensors) -> None:
        codes = t[LAYER0 + "mlp.fc.weight"].view(torch.uint8).view(-1)
        at = int((codes != codes[0]).nonzero()[0])
        codes[[0, at]] = codes[[at, 0]]

    edit(out, change, [2])


@damage("a page of zeros in a matrix")
def _(out: Path, other: Path) -> None:
    edit(out, lambda t: t[LAYER1 + "mlp.fc.weight"].view(torch.uint8).view(-1)[4096:8192].zero_(), [1])


@damage("a file of zeros behind its header")
def _(out: Path, other: Path) -> None:
    data = bytearray(rank_path(out, 1).read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    rank_path(out, 1).write_bytes(data[:start] + bytes(len(data) - start))


@damage("a whole matrix transposed")
def _(out: Path, other: Path) -> None:
    name = LAYER0 + "attention.dense.weight"
    parts = [load_file(rank_path(out, rank))[name].view(torch.uint8) for rank in range(RANKS)]
    turned = torch.cat(parts, 1).t().contiguous().chunk(RANKS, 1)
    for rank in range(RANKS):
        edit(out, partial(put, name=name, value=turned[rank].contiguous().view(torch.float8_e4m3fn)), [rank])


@damage("v heads of two ranks exchanged")
def _(out: Path, other: Path) -> None:
    name, v = LAYER1 + "attention.qkv.weight", slice(Q_ROWS + KV_ROWS, None)
    first, second = (load_file(rank_path(out, rank))[name].view(torch.uint8) for rank in (0, 1))
    first[v], second[v] = second[v].clone(), first[v].clone()
    for rank, codes in enumerate((first, second)):
        edit(out, partial(put, name=name, value=codes.view(torch.float8_e4m3fn)), [rank])


@damage("the first layer twice")
def _(out: Path, other: Path) -> None:
    def change(t: Tensors) -> None:
        for name in [name for name in t if name.startswith(LAYER1)]:
            t[name] = t[LAYER0 + name.removeprefix(LAYER1)].clone()

    edit(out, change)


@damage("an expert twice")
def _(out: Path, other: Path) -> None:
    def change(t: Tensors) -> None:
        for part in ("fc", "proj"):
            for leaf in ("weight", "weights_scaling_factor"):
                bytes_ = t[f"{LAYER0}mlp.{part}.{leaf}"].view(torch.uint8)
                bytes_[1] = bytes_[0]

    edit(out, change)


@damage("embedding shifted by a row")
def _(out: Path, other: Path) -> None:
    edit(out, lambda t: put(t, "transformer.vocab_embedding.weight", t["transformer.vocab_embedding.weight"].roll(1, 0)))


@damage("NaN in a norm, on all ranks")
def _(out: Path, other: Path) -> None:
    edit(out, lambda t: t[LAYER0 + "residual_layernorm.weight"][7:8].fill_(float("nan")))


@damage("NaN in the final norm, on all ranks")
def _(out: Path, other: Path) -> None:
    edit(out, lambda t: t["transformer.ln_f.weight"][7:8].fill_(float("nan")))


@damage("one bit of the final norm, on one rank")
def _(out: Path, other: Path) -> None:
    edit(out, lambda t: put(t, "transformer.ln_f.weight", flip(t["transformer.ln_f.weight"], 0, 0)), [3])


@damage("final norm of another model")
def _(out: Path, other: Path) -> None:
    stranger = load_file(rank_path(other, 0))["transformer.ln_f.weight"]
    edit(out, lambda t: put(t, "transformer.ln_f.weight", stranger))


@damage("norms of another model")
def _(out: Path, other: Path) -> None:
    stranger = load_file(rank_path(other, 0))
    edit(out, lambda t: t.update({name: stranger[name] for name in t if "layernorm" in name}))


@damage("KV scale missing on one rank")
def _(out: Path, other: Path) -> None:
    edit(out, lambda t: t.pop(LAYER0 + "attention.kv_cache_scaling_factor"), [2])


@damage("a file one byte short")
def _(out: Path, other: Path) -> None:
    rank_path(out, 1).write_bytes(rank_path(out, 1).read_bytes()[:-1])


@damage("a file one byte long")
def _(out: Path, other: Path) -> None:
    rank_path(out, 1).write_bytes(rank_path(out, 1).read_bytes() + b"\0")


def edit_header(path: Path, change: Callable[[str], str]) -> None:
    """Rewrite the header as text; the data stay where they are."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    text = change(data[8 : 8 + length].decode().rstrip()).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


@damage("a header with a tensor listed twice")
def _(out: Path, other: Path) -> None:
    def change(text: str) -> str:
        begin = text.index('"lm_head.weight"')
        return text[:-1] + "," + text[begin : text.index("}", begin) + 1] + "}"

    edit_header(rank_path(out, 0), change)


@damage("a header with overlapping tensors")
def _(out: Path, other: Path) -> None:
    def change(text: str) -> str:
        table = json.loads(text)
        table[LAYER0 + "residual_mlp.gate.weight"]["data_offsets"] = table[LAYER0 + "residual_mlp.fc.weight"]["data_offsets"]
        return json.dumps(table)

    edit_header(rank_path(out, 0), change)


@damage("a header with two tensors exchanged")
def _(out: Path, other: Path) -> None:
    def change(text: str) -> str:
        table = json.loads(text)
        names = [LAYER0 + "residual_mlp.fc.weight", LAYER0 + "residual_mlp.gate.weight"]
        table[names[0]], table[names[1]] = table[names[1]], table[names[0]]
        return json.dumps(table)

    edit_header(rank_path(out, 0), change)


@damage("tokenizer missing")
def _(out: Path, other: Path) -> None:
    (out / "tokenizer.json").unlink()


@damage("tokenizer of another model")
def _(out: Path, other: Path) -> None:
    (out / "tokenizer.json").write_text("{}")


@damage("config of another norm epsilon")
def _(out: Path, other: Path) -> None:
    edit_config(out, lambda raw: raw.update(norm_epsilon=1e-6))


@damage("config of a longer context")
def _(out: Path, other: Path) -> None:
    edit_config(out, lambda raw: raw.update(max_position_embeddings=8192))


@damage("config with an unknown key")
def _(out: Path, other: Path) -> None:
    edit_config(out, lambda raw: raw.update(clip_qkv=8.0))


@damage("config with logits in float16")
def _(out: Path, other: Path) -> None:
    edit_config(out, lambda raw: raw.update(logits_dtype="float16"))


@damage("config of a smaller vocabulary")
def _(out: Path, other: Path) -> None:
    edit_config(out, lambda raw: raw.update(vocab_size=510))


@damage("config without renormalization")
def _(out: Path, other: Path) -> None:
    edit_config(out, lambda raw: raw["moe"].update(normalization_mode=0))  # type: ignore[attr-defined]


@damage("report of another checkpoint")
def _(out: Path, other: Path) -> None:
    shutil.copy(other / "report" / "quantize.json", out / "report" / "quantize.json")


@damage("report cut short")
def _(out: Path, other: Path) -> None:
    path = out / "report" / "quantize.json"
    path.write_bytes(path.read_bytes()[:-9])


@damage("digests of another checkpoint")
def _(out: Path, other: Path) -> None:
    shutil.copy(other / "report" / "digests.json", out / "report" / "digests.json")


@damage("digests cut short")
def _(out: Path, other: Path) -> None:
    path = out / "report" / "digests.json"
    path.write_bytes(path.read_bytes()[:-9])
