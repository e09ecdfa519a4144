"""The command line: one file a command; nothing else parses argv, prints, or configures logging."""
