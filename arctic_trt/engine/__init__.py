"""Engines: a TensorRT-LLM checkpoint made ready to run. ``torch`` needs no GPU; ``tensorrt_llm`` needs TensorRT-LLM."""
