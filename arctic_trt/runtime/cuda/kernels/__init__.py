"""Triton kernels. Importing a module of this package imports Triton; shapes and meanings are those of the operations.

Divisions that decide about an e4m3 code are rounded as IEEE 754 says, as on the CPU, and casts saturate but keep NaN.
"""
