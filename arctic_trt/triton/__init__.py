"""Serving by Triton Inference Server: the model repository, what runs in it, and the server around it."""
