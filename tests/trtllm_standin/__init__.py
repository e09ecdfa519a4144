"""A recording stand-in for ``tensorrt_llm`` 1.0 to 1.2, and what starts it."""
