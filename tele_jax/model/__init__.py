"""The decoder: Flax modules for shape and declaration, pure functions for the arithmetic."""
