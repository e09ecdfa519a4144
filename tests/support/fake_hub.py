"""A Hugging Face hub on this machine: one repository, whose transfers can be spoiled."""

from __future__ import annotations

import hashlib
import json
import re
import struct
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "314d82d" + "0" * 33
REPO = "Snowflake/snowflake-arctic-instruct"


def shard(*sizes: int) -> bytes:
    """A safetensors file whose tensors have so many bytes."""
    tensors, begin = {}, 0
    for index, size in enumerate(sizes):
        tensors[f"t{index}"] = {"dtype": "U8", "shape": [size], "data_offsets": [begin, begin + size]}
        begin += size
    header = json.dumps(tensors).encode()
    return struct.pack("<Q", len(header)) + header + bytes(range(256)) * (begin // 256) + bytes(begin % 256)


def arctic_files() -> dict[str, bytes]:
    """What the real repository has, small: two shards, leftovers of an earlier upload, remote code, another format."""
    index = {
        "metadata": {"total_size": 3000 + 5000},
        "weight_map": {
            "model.embed_tokens.weight": "model-00001-of-00002.safetensors",
            "model.norm.weight": "model-00002-of-00002.safetensors",
            "lm_head.weight": "model-00002-of-00002.safetensors",
        },
    }
    return {
        "config.json": b'{"model_type": "arctic"}',
        "generation_config.json": b"{}",
        "tokenizer.json": b'{"model": {}}',
        "tokenizer.model": b"pieces",
        "tokenizer_config.json": b"{}",
        "model.safetensors.index.json": json.dumps(index).encode(),
        "model-00001-of-00002.safetensors": shard(3000),
        "model-00002-of-00002.safetensors": shard(2000, 3000),
        "model-00001-of-00195.safetensors": shard(4000),
        "modeling_arctic.py": b"raise SystemExit",
        "quant_config.json": b"{}",
        "pytorch_model.bin": b"old",
        "README.md": b"# Arctic",
        ".gitattributes": b"*.safetensors filter=lfs",
    }


@dataclass
class FakeHub:
    """Use as a context manager; ``environment`` points a program at it.

    ``stated_sizes`` overrides what the hub says about files, ``cut_once`` ends the first transfer of a file after so many bytes,
    ``broken`` answers 500. ``fetched`` lists (name, first byte) of every transfer, in order.
    """

    files: dict[str, bytes] = field(default_factory=arctic_files)
    commit: str = COMMIT
    stated_sizes: dict[str, int] = field(default_factory=dict)
    cut_once: dict[str, int] = field(default_factory=dict)
    broken: set[str] = field(default_factory=set)
    fetched: list[tuple[str, int]] = field(default_factory=list)
    listings: list[str] = field(default_factory=list)

    def __enter__(self) -> FakeHub:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                hub.answer(self, with_body=False)

            def do_GET(self) -> None:
                hub.answer(self, with_body=True)

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def environment(self) -> dict[str, str]:
        return {"HF_ENDPOINT": f"http://127.0.0.1:{self._server.server_port}", "HF_HUB_DISABLE_XET": "1", "no_proxy": "127.0.0.1"}

    def answer(self, request: BaseHTTPRequestHandler, *, with_body: bool) -> None:
        path = request.path.split("?")[0]
        if listing := re.fullmatch(rf"/api/models/{REPO}/revision/(.+)", path):
            self._list(request, listing[1])
        elif file := re.fullmatch(rf"/{REPO}/resolve/{self.commit}/(.+)", path):
            self._send(request, file[1], with_body=with_body)
        else:
            self._refuse(request, 404, "RevisionNotFound")

    def _list(self, request: BaseHTTPRequestHandler, revision: str) -> None:
        if revision not in ("main", self.commit):
            self._refuse(request, 404, "RevisionNotFound")
            return
        self.listings.append(revision)
        body = json.dumps({"id": REPO, "sha": self.commit, "siblings": [self._describe(name) for name in self.files]}).encode()
        request.send_response(200)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)

    def _describe(self, name: str) -> dict[str, Any]:
        data = self.files[name]
        size = self.stated_sizes.get(name, len(data))
        described: dict[str, Any] = {"rfilename": name, "size": size, "blobId": git_sha1(data)}
        if name.endswith((".safetensors", ".model", ".bin")):
            described["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": size, "pointerSize": 135}
        return described

    def _send(self, request: BaseHTTPRequestHandler, name: str, *, with_body: bool) -> None:
        if name not in self.files:
            self._refuse(request, 404, "EntryNotFound")
            return
        if name in self.broken:
            self._refuse(request, 403, "")
            return
        data, described = self.files[name], self._describe(name)
        match = re.match(r"bytes=(\d+)-", request.headers.get("Range", ""))
        begin = int(match[1]) if match else 0
        request.send_response(206 if match else 200)
        request.send_header("ETag", f'"{described.get("lfs", {}).get("sha256", described["blobId"])}"')
        request.send_header("X-Repo-Commit", self.commit)
        request.send_header("Content-Length", str(len(data) - begin))
        if match:
            request.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
        request.end_headers()
        if with_body:
            self.fetched.append((name, begin))
            request.wfile.write(data[begin : self.cut_once.pop(name, None)])

    def _refuse(self, request: BaseHTTPRequestHandler, status: int, code: str) -> None:
        request.send_response(status)
        request.send_header("X-Error-Code", code)
        request.send_header("Content-Length", "0")
        request.end_headers()


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
