"""python -m lora_ga_trainer.evaluation gsm8k|humaneval|mt_bench|glue --adapter out --base MODEL ...: `lora-ga eval`

Under `accelerate launch -m lora_ga_trainer.evaluation ...` the items are shared by all processes.
"""

from functools import partial

from ..cli.eval import main as eval_main

main = partial(eval_main, prog="python -m lora_ga_trainer.evaluation")

if __name__ == "__main__":
    main()
