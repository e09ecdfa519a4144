"""Evaluation of a model or a checkpoint layer by layer: perplexity, and its distance from the original."""
