"""Which layers of a model have a cheaper form, told by their code, and putting these forms in their place for a while."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import CodeType
from typing import Any

from torch import Tensor, nn

from spunge.unlearning.quick.layers import gated, normed
from spunge.unlearning.quick.products import is_watched, multiplied_at_once


@contextmanager
def quickened(model: nn.Module) -> Iterator[None]:
    """Inside the block the layers that are known compute in their cheaper forms; all others as ever."""
    replaced = {module: form for module in model.modules() if (form := _form_of(module)) is not None}
    for module, form in replaced.items():
        vars(module)["forward"] = form
    try:
        yield
    finally:
        for module in replaced:
            vars(module).pop("forward", None)


def _form_of(module: nn.Module) -> Callable[..., Any] | None:
    """A module's forward in its cheaper form; None where the module is not known, or its forward is no longer its class's."""
    from peft.tuners.lora.layer import Linear
    from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

    if "forward" in vars(module):
        return None
    if type(module) is Linear:
        return partial(_lora, module)
    if _computes_as(module, LlamaRMSNorm):
        return partial(_norm, module)
    if _computes_as(module, LlamaMLP) and type(module.act_fn) in _silus():
        return partial(_gate, module)
    return None


def _computes_as(module: nn.Module, known: type[nn.Module]) -> bool:
    """Whether a module's forward is the known one's, instruction by instruction: many architectures have copies of one class."""
    own, other = type(module).forward, known.forward
    return _code(own) == _code(other) and own.__closure__ is None


def _code(function: Any) -> tuple[Any, ...]:
    code: CodeType = function.__code__
    return code.co_code, code.co_consts, code.co_names, code.co_varnames, function.__defaults__


def _silus() -> tuple[type, ...]:
    """What transformers and torch call the activation x sigmoid(x)."""
    from transformers.activations import ACT2CLS

    return (nn.SiLU, ACT2CLS["silu"])


def _lora(module: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    outs = None if args or kwargs else multiplied_at_once(x, [module])
    out: Tensor = type(module).forward(module, x, *args, **kwargs) if outs is None else outs[0]
    return out


def _norm(module: Any, hidden_states: Tensor) -> Tensor:
    return normed(hidden_states, module.weight, module.variance_epsilon)


def _gate(module: Any, x: Tensor) -> Tensor:
    if is_watched(module.act_fn):
        out: Tensor = type(module).forward(module, x)
        return out
    return gated(x, module.gate_proj, module.up_proj, module.down_proj)
