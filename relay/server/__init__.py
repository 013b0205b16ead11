"""One process: listening sockets, signals, and the order of the shutdown."""
