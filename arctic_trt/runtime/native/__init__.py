"""The arithmetic of a step in C: sources, their compilation on first use, and the kernels that call them."""
