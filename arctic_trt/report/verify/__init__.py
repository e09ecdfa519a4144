"""Verification of checkpoints and engines: their structure, their values, and the original that they were made of."""
