"""Kinds of KV cache. Source: ``tensorrt_llm.bindings.KVCacheType`` (1.0, 1.1), ``tensorrt_llm/llmapi/kv_cache_type.py`` (1.2)."""

from __future__ import annotations

import enum


class KVCacheType(enum.Enum):
    """Names are read without regard to case by all three versions."""

    CONTINUOUS = "continuous"
    PAGED = "paged"
    DISABLED = "disabled"

    @classmethod
    def _missing_(cls, value: object) -> KVCacheType | None:
        return next((kind for kind in cls if isinstance(value, str) and kind.value == value.lower()), None)
