"""TensorRT engines, built and run by TensorRT-LLM, which only :mod:`worker` and :mod:`session` import, when they are called."""
