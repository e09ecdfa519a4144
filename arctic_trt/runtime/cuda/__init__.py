"""The torch engine on CUDA: one GPU a rank, FP8 tensor cores, a decode step as one CUDA graph."""
