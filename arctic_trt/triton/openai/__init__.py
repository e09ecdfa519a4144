"""OpenAI's interface in front of Triton: completions, chats, and a page to chat on. Knows no tokenizer and no engine."""
