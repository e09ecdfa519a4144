"""arctic-trt: Snowflake Arctic from its Hugging Face checkpoint to FP8 engines, and tokens out of them."""

__version__ = "0.1.0"
