"""Looking at runs: what `lora-ga inspect` and `lora-ga compare` show, and `lora-ga export` says.

runs          a run's folder: its checkpoints, its log
norms         ‖A0‖, ‖B0‖, ‖dA‖, ‖dB‖ per layer, from a checkpoint's files
exported      what an export loses, in its weights and on data
layer_names   layers by depth and kind
figures       the plots; the only module that imports matplotlib
page          one HTML page around them
"""
