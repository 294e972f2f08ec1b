"""Sample -> gradient -> factors -> written.

attach          before anything is sharded: the delta form
initialize      the initialization, and restarts
factorization   every gradient factored on one process, written on all
"""

from .attach import attach_lora_ga

__all__ = ["attach_lora_ga"]
