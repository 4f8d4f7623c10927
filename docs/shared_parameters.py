"""For the API reference: an entry of a docstring for several parameters, `weight, bias: …`, becomes one for each.

The first has the text, the others name the first; so each is shown with its type, and a name that the function does not
have is an error of the build, as it is everywhere else.
"""

import re
from typing import Any

import griffe

ENTRY = re.compile(r"^(    )(\w+(?:, \w+)+): (.*(?:\n {8}.*)*)$", re.MULTILINE)


class SharedParameters(griffe.Extension):
    """Rewrites docstrings before they are parsed."""

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        """Called for every function that griffe has read."""
        if func.docstring is None or "Args:\n" not in func.docstring.value:
            return
        before, args, rest = func.docstring.value.partition("Args:\n")
        section, end, behind = rest.partition("\n\n")
        func.docstring.value = before + args + ENTRY.sub(apart, section) + end + behind


def apart(found: re.Match[str]) -> str:
    """The entries for each of the parameters that one entry describes."""
    indent, names, text = found.groups()
    first, *others = names.split(", ")
    return "\n".join([f"{indent}{first}: {text}", *(f"{indent}{name}: described with `{first}`." for name in others)])
