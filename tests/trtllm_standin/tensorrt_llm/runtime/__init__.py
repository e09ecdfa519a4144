"""Source: ``tensorrt_llm/runtime/__init__.py``."""

from tensorrt_llm.runtime.decoding import SamplingConfig
from tensorrt_llm.runtime.model_runner_cpp import ModelRunnerCpp

PYTHON_BINDINGS = True

__all__ = ["PYTHON_BINDINGS", "ModelRunnerCpp", "SamplingConfig"]
