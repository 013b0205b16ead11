"""What things are: frozen values, valid from construction. Pure."""
