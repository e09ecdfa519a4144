"""Numbers about checkpoints and machines: what a job will take before it starts, and what it was worth when it is done."""
