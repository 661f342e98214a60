"""Everything that knows about other processes."""
