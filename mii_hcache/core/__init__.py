"""Pure values and arithmetic. Standard library only."""
