"""Every operation of one rounding is an ordinary function: its name, its signature and its documentation."""

import inspect
import pickle

import pytest

from fpsim import reference
from fpsim.reference import add, fma, round, sqrt
from tests.shared.formats import operand_count

OPERATIONS = [name for name in reference.__all__ if hasattr(getattr(reference, name), "exact")]


def test_these_are_the_operations():
    assert set(OPERATIONS) == {
        *("add", "sub", "mul", "div", "fma", "sqrt", "remainder", "convert"),
        *("exp", "exp2", "log", "log2", "sin", "cos", "tanh", "erf", "gelu", "sigmoid", "rsqrt", "pow"),
    }


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_takes_its_operands_and_then_the_modes_of_round(name):
    operation, count = getattr(reference, name), operand_count(name)
    parameters = list(inspect.signature(operation).parameters.values())
    assert [p.name for p in parameters[:count]] == list(inspect.signature(operation.exact).parameters)[1:]
    assert parameters[count:] == list(inspect.signature(round).parameters.values())[1:]
    assert inspect.isfunction(operation) and (operation.__name__, operation.__qualname__) == (name, name)
    assert ">>> " in inspect.getdoc(operation)
    assert pickle.loads(pickle.dumps(operation)) is operation


def test_operands_and_modes_may_be_named():
    assert add(b=1, a=2, format="e4m3fn", rounding="up", overflow=None, random=None) == 3


def test_wrong_arguments_are_errors():
    for wrong in (
        lambda: add(1, format="fp16"),
        lambda: add(1, 2),
        lambda: sqrt(1, "fp16", "up", None, 3),
        lambda: fma(1, 2, 3, "fp16", tininess="before"),
        lambda: add(1, 2, "fp16", b=3),
    ):
        with pytest.raises(TypeError):
            wrong()
