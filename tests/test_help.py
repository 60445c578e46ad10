"""What a person is told in a cell: help, the last line of a cell, an error."""

import ast
import inspect

import numpy as np
import pytest

import spinereg
from spinereg.apps.help import EXAMPLES, meanings
from spinereg.files.problems import InputError, Problem

FUNCTIONS = [name for name in spinereg.__all__ if inspect.isfunction(getattr(spinereg, name))]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_help_tells_every_parameter(name):
    function = getattr(spinereg, name)
    said = meanings(function)
    for parameter in inspect.signature(function).parameters.values():
        assert said.get(parameter.name), f"{name}({parameter.name}) has no comment"
        assert f"\n{parameter.name} : " in function.__doc__ and said[parameter.name] in function.__doc__
    assert said["return"] or function.__annotations__["return"] is None, f"{name}: no comment on what it returns"
    assert not any(line.rstrip() != line for line in function.__doc__.splitlines() if line.strip())


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_calls_what_there_is(name):
    "Every call of the package in an example fits the signature of what it calls."
    calls = [node for node in ast.walk(ast.parse(EXAMPLES[name])) if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("spinereg.")]
    assert name in {ast.unparse(call.func).removeprefix("spinereg.") for call in calls}
    for call in calls:
        function = getattr(spinereg, ast.unparse(call.func).removeprefix("spinereg."))
        inspect.signature(function).bind(*call.args, **{word.arg: word.value for word in call.keywords})


def test_an_input_error_is_one_readable_block():
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell.instance()
    shown = []
    shell._showtraceback = lambda kind, value, lines: shown.extend(lines)
    shell.run_cell("import spinereg; spinereg.register('a.nii.gz', 'b.nii.gz')")
    (text,) = shown
    assert text.startswith("InputError: 2 problems") and "a.nii.gz" in text and "Traceback" not in text and len(text.splitlines()) == 3
    with pytest.raises(InputError, match="lost"):
        raise InputError(Problem("fixed", "a", "lost", "Look."))


def test_objects_are_shown_in_a_line():
    from spinereg.files.transforms import SpineTransform
    from spinereg.space.geometry import Grid

    torch = pytest.importorskip("torch")
    zeros = torch.zeros(1, 3, 4, 4, 4)
    shown = repr(SpineTransform(Grid((4, 4, 4), np.eye(4)), zeros, zeros, np.eye(4)))
    assert shown.startswith("SpineTransform(up to 0.0 mm") and "\n" not in shown
