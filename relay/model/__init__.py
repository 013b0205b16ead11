"""Domain values: immutable and valid from construction. Pure."""
