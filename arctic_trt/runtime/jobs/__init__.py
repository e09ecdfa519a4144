"""Batch jobs: a file of requests in, a file of results out, in whatever order they finish and however often it is interrupted."""
