"""``python -m arctic_trt`` is the same program as ``arctic-trt``."""

from arctic_trt.cli.main import main

if __name__ == "__main__":
    main()
