"""``arctic-trt bench``: how fast an engine or a server answers, beside what this machine's memory allows."""
