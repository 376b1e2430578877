"""What test modules share: stand-ins, handlers, and helpers that assert."""
