"""Running an engine, one process a rank: on torch, rank 0 schedules and samples and the others follow; or on TensorRT-LLM."""
