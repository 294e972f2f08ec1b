"""Checkpoints: ordinary adapters that also resume exactly.

adapter_files   saving, loading
layouts         how a layer's parts form its matrices in the file, of rank 2R, or R without the offset
state           lora_ga.json: the run's settings and results
model_card      README.md
completeness    lora_ga_files.json: whether the checkpoint is whole
scaling         the scaling in the plain form that every reader computes
portable        other forms of an adapter's file: the scaling in B, another rank, which `truncation` cuts
merging         the base's own files with the adapter in them
exporting       a checkpoint to a bare adapter or a merged model, in one process
"""

from .exporting import export

__all__ = ["export"]
