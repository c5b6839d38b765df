"""What bitsandbytes says as peft imports it."""

import logging

import pytest

import spunge.weights  # noqa: F401


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("Failed to load CPU gemm_4bit_forward from kernels-community: %s. Please make sure ..", False),
        ("The native library could not be loaded: %s", True),
    ],
)
def test_advice_on_a_faster_product_that_is_never_used_is_dropped_and_nothing_else(said: str, told: bool) -> None:
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    record = logger.makeRecord(logger.name, logging.WARNING, __file__, 1, said, ("no module",), None)
    assert bool(logger.filter(record)) == told
