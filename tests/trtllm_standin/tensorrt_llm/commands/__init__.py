"""Source: ``tensorrt_llm/commands``."""
