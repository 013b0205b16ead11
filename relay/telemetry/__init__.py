"""Log lines, request counts, and metrics of the process."""
