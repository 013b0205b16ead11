"""Several processes that serve one relay: a feeder and its workers, over a Unix socket.

The *feeder* owns what must exist once: upstream connections, databases, snapshots, events, figures.
*Workers* own clients and nothing else. To a worker the feeder is a directory of environments, the
source of their data and the acceptor of events.
"""
