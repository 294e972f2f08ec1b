"""The environment in which a process's resident memory is the memory it has in use; malloc reads it when the process starts."""

MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "16384", "MALLOC_TRIM_THRESHOLD_": "16384"}
"""By default malloc keeps freed blocks, which a peak of resident memory would count as in use (25 to 40 MiB here)."""
