"""What the paper compares: `table.METHODS`, and the trainers that it takes."""
