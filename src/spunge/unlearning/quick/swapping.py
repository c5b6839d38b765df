"""Which layers of a model have a cheaper form, told by their code, and putting these forms in their place for a while."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from types import CodeType
from typing import Any

from torch import Tensor, nn

from spunge.unlearning.forms import FORMS, Forms
from spunge.unlearning.quick.casting import cast_at_each_call
from spunge.unlearning.quick.layers import gated, normed, normed_by_torch
from spunge.unlearning.quick.products import Cast, is_adapted, is_watched, multiplied_at_once


@contextmanager
def quickened(model: nn.Module, forms: Forms = FORMS["cpu"], whole: bool = True) -> Iterator[None]:
    """Inside the block the layers that are known compute in their cheaper forms; all others as ever.

    forms: of the device that the model is on. whole: False where a layer is called at times when the model is not, or where its
    factors are in shares between the calls.
    """
    if not forms.layers:
        yield
        return
    at_once = forms.cast_at_once and whole
    casting: AbstractContextManager[dict[nn.Module, Cast]] = cast_at_each_call(model) if at_once else nullcontext({})
    with casting as cast:
        replaced = {module: form for module in model.modules() if (form := _form_of(module, forms, cast)) is not None}
        for module, form in replaced.items():
            vars(module)["forward"] = form
        try:
            yield
        finally:
            for module in replaced:
                vars(module).pop("forward", None)


def _form_of(module: nn.Module, forms: Forms, cast: Mapping[nn.Module, Cast]) -> Callable[..., Any] | None:
    """A module's forward in its cheaper form; None where the module is not known, or its forward is no longer its class's. cast: as
    of `product_of`."""
    from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

    if "forward" in vars(module):
        return None
    if is_adapted(module):
        return partial(_lora, module, cast)
    if _computes_as(module, LlamaRMSNorm):
        return partial(_torch_norm if forms.norm_by_torch else _norm, module)
    if _computes_as(module, LlamaMLP) and type(module.act_fn) in _silus():
        return partial(_gate, module, cast)
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


def _lora(module: nn.Module, cast: Mapping[nn.Module, Cast], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    outs = None if args or kwargs else multiplied_at_once(x, [module], cast)
    out: Tensor = type(module).forward(module, x, *args, **kwargs) if outs is None else outs[0]
    return out


def _norm(module: Any, hidden_states: Tensor) -> Tensor:
    return normed(hidden_states, module.weight, module.variance_epsilon)


def _torch_norm(module: Any, hidden_states: Tensor) -> Tensor:
    return normed_by_torch(hidden_states, module.weight, module.variance_epsilon)


def _gate(module: Any, cast: Mapping[nn.Module, Cast], x: Tensor) -> Tensor:
    if is_watched(module.act_fn):
        out: Tensor = type(module).forward(module, x)
        return out
    return gated(x, module.gate_proj, module.up_proj, module.down_proj, cast)
