"""flex_attention on a GPU, which transformers compiles: minutes for the compiler, so these come after the other tests."""

import dense_reference
import torch
from gpu_results import GRADIENT_TOLERANCE
from peft import get_peft_model
from test_gpu_estimation import EXACT, attending, largest_relative_error
from test_probe import estimated_gradients
from tiny import lora_config, tiny_batches

from lora_ga_trainer import initialize_lora_ga
from lora_ga_trainer.gradient.memory import peak_memory


def test_gradient(cuda):
    batches = tiny_batches((3, 5))
    found = estimated_gradients(get_peft_model(attending("flex_attention"), lora_config()).to(cuda), batches)
    reference = dense_reference.autograd_gradients(attending("eager"), found, batches)
    assert largest_relative_error(found, reference) < GRADIENT_TOLERANCE


def test_it_stays_compiled_while_estimating(cuda):
    """Uncompiled it makes the full scores of every head, T×T."""
    length = 4096
    ids = torch.randint(3, 64, (1, length), generator=torch.Generator().manual_seed(1))
    model = get_peft_model(attending("flex_attention"), lora_config()).to(cuda)
    with peak_memory(cuda) as peak:
        initialize_lora_ga(model, [{"input_ids": ids, "labels": ids}], EXACT, disable_tqdm=True)
    assert peak.extra_bytes < 4 * 2 * length**2, "no room for one score in float32 per head and pair of tokens"
