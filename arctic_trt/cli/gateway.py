"""``arctic-trt gateway``: the OpenAI front end of a server, which starts it itself. Not for people, and in no help."""

from __future__ import annotations

import json
import sys

import click

from arctic_trt.output import Output


@click.command("gateway", hidden=True)
def command() -> None:
    """Serve the OpenAI API as the options on stdin, one JSON object, say: they hold the API key, and flags are for all to see."""
    Output().configure_logging()
    from arctic_trt.triton.openai.options import OpenAiOptions
    from arctic_trt.triton.openai.server import run

    run(OpenAiOptions(**json.load(sys.stdin)))
