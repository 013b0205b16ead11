"""The relay seen from outside: log lines, counters, the process's own figures."""
