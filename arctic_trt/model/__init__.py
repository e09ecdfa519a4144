"""What Arctic is: its configuration, its tensor names, how it is cut over ranks, and its layer."""
