"""How a benchmark measures: in processes of its own, on which hardware, and where the results go."""
