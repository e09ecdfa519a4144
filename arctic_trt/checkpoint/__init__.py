"""Bytes on disk: reading Hugging Face shards in ranges, writing files whose layout is known before the first byte."""
