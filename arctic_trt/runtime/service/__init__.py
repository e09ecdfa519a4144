"""An engine that serves: ranks that take requests from a socket, and the leader that starts and supervises them."""
