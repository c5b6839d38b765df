"""What the libraries are imported without, and that what is put off is done when it is asked for."""

import subprocess
import sys

import torch

from spunge.weights import importing


def test_peft_is_imported_without_torchs_compiler() -> None:
    code = (
        "import gc, sys, torch; compile_now = torch.compile; from spunge.weights.importing import import_peft; import_peft(); "
        "assert 'peft' in sys.modules and 'transformers.modeling_utils' in sys.modules; "
        "assert torch.compile is compile_now and gc.isenabled(); "
        "print('torch._inductor.compile_fx' in sys.modules)"
    )
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert made.stdout.split() == ["False"]


def test_a_function_is_compiled_once_when_it_is_first_called() -> None:
    asked = []

    def compiler(what: object, **how: object) -> object:
        asked.append(how)
        return lambda value: ("compiled", value)

    later = importing._later(compiler)

    @later(dynamic=False)
    def plain(value: int) -> int:
        return value

    assert asked == []
    assert [plain(1), plain(2)] == [("compiled", 1), ("compiled", 2)]
    assert asked == [{"dynamic": False}]
    assert plain.__name__ == "plain"


def test_a_module_is_compiled_at_once() -> None:
    module = torch.nn.Linear(1, 1)
    assert importing._later(lambda what: ("compiled", what))(module) == ("compiled", module)
