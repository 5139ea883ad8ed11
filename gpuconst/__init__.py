"""Fill device memory with a constant, and hand it to any framework without a copy."""
