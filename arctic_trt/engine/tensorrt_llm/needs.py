"""What TensorRT-LLM needs of a machine to build Arctic; numbers alone, so that whoever asks loads nothing."""

FP8_SM = 89
"""The first architecture with FP8 tensor cores."""
WORKER_BYTES_A_SHARD_BYTE = 3
"""Host memory of one build: the weights as loaded, as TensorRT's constants, and the serialized engine. An estimate."""
TIGHT_BYTES_A_SHARD_BYTE = 2
"""Less than that has no chance."""
