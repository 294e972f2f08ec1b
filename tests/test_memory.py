"""The peak meter, on the CPU."""

import mmap

import pytest
import torch

from lora_ga_trainer.gradient.memory import peak_memory

CPU = torch.device("cpu")


def test_it_sees_a_passing_peak():
    # straight from the kernel: malloc may have 200 MB left from earlier tests, and hand out those
    with peak_memory(CPU) as peak, mmap.mmap(-1, 200_000_000) as passing:
        for start in range(0, len(passing), mmap.PAGESIZE):
            passing[start] = 1
    if peak.extra_bytes is None:
        pytest.skip("this system offers no peak that can be reset")
    # pages of code may be loaded meanwhile: 10 %
    assert peak.extra_bytes == pytest.approx(200e6, rel=0.1)


def test_it_starts_from_the_present_not_from_an_old_peak():
    earlier = torch.ones(50_000_000)
    del earlier
    with peak_memory(CPU) as peak:
        pass
    assert peak.extra_bytes is None or peak.extra_bytes < 20e6
