"""Serving: a model repository around an engine, and the Triton Inference Server that loads it."""
