"""The model on disk: checkpoint folders, deltas, adapters, and other models as differences from a base."""

import logging

ADVICE = "Failed to load CPU gemm_4bit_forward from kernels-community"


def _is_no_advice(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(ADVICE)


# peft imports bitsandbytes wherever that is installed, which then advises on a package for a faster 4-bit product, in every process
# and whether anything is packed or not. Ours turn that product off (`spunge.model.packing`); all else that it says is told.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_no_advice)
