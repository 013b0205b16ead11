"""What the operator wants: options, where they come from, and what they must be."""
