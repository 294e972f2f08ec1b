"""The methods that the paper compares: `table.METHODS`, and the trainers it needs."""
