"""Quantization: calibration data, observed maxima, scales, casts, and the pass over the checkpoint that uses them."""
