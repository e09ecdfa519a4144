"""Arctic's tokenizer, loaded from files beside the weights and never from a hub.

The special tokens of the chat template exist only in ``tokenizer.json`` (``tokenizer.model`` still has the pieces they replaced),
so that file is required. Plain text is prefixed with ``<s>`` by the file's own post-processor; a rendered chat is not, because
the template brings all the control tokens the model was trained with.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from arctic_trt.errors import RefusedError, UsageError

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
)


class Tokenizer:
    """Text and chats to token ids and back."""

    def __init__(self, directory: Path) -> None:
        """Load ``directory/tokenizer.json``.

        Raises :class:`UsageError` when it is absent or broken, :class:`RefusedError` when transformers is not installed.
        """
        if not (directory / FILES[0]).is_file():
            raise UsageError(
                f"{directory / FILES[0]} does not exist, so text cannot be tokenized.",
                "Put Arctic's tokenizer.json and tokenizer_config.json there, or give prompts as token ids.",
            )
        self.directory = directory
        self._hf = _load(directory)

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, beginning with ``<s>``."""
        return list(self._hf(text)["input_ids"])

    def encode_bare(self, text: str) -> list[int]:
        """Ids of plain text alone, without ``<s>``."""
        return list(self._hf(text, add_special_tokens=False)["input_ids"])

    def encode_chat(self, messages: list[dict[str, str]], *, reply: bool) -> list[int]:
        """Ids of a conversation under the chat template; ``reply`` opens the assistant's turn at the end."""
        return self.encode_bare(self.render_chat(messages, reply=reply))

    def render_chat(self, messages: list[dict[str, str]], *, reply: bool, unfinished: bool = False) -> str:
        """Text of a conversation under the chat template; ``unfinished`` leaves the last message open, to be continued."""
        if not self._hf.chat_template:
            raise UsageError(
                f"{self.directory / FILES[1]} has no chat_template, so messages cannot be rendered.",
                "Use the tokenizer of Arctic instruct, or give plain text.",
            )
        from jinja2 import TemplateError

        try:
            return str(
                self._hf.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=reply, continue_final_message=unfinished
                )
            )
        except TemplateError as error:
            raise UsageError(f"The messages do not fit the chat template of {self.directory}: {error}.") from None

    def decode(self, ids: list[int]) -> str:
        """Text of ``ids`` without control tokens."""
        return str(self._hf.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    @property
    def hf(self) -> Any:
        """The underlying ``transformers.PreTrainedTokenizerFast``."""
        return self._hf


def _load(directory: Path) -> Any:
    try:
        from transformers import PreTrainedTokenizerFast
        from transformers.utils import logging as transformers_logging
    except ImportError:
        raise RefusedError(
            "The package transformers is not installed, so text cannot be tokenized.",
            "pip install 'arctic-trt[tokenizer]', or give token ids.",
        ) from None
    transformers_logging.set_verbosity_error()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        return PreTrainedTokenizerFast.from_pretrained(str(directory), local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exception for a malformed file
        raise UsageError(f"{directory / FILES[0]} cannot be loaded: {error}.", "Download the tokenizer files again.") from None
