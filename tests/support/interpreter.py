"""Triton's interpreter without what it does again and again, half the time of the tests that use it.

What the kernels compute does not depend on any of it:

- At a launch the interpreter replaces the functions of `triton.language` by its own. It does so once more at every call
  of a device function within, looking through all the language's members for functions that it has replaced already.
- Each sum and product of integers is computed once more in 64 bits and compared, for an assertion that is left out.
- Each array's dtype is looked up in a table of all dtypes that is built for it.
"""

import dataclasses
import functools
from types import ModuleType
from typing import Any

BEFORE: dict[str, Any] = {}  # what was changed, by its name in the interpreter's module


def speed_up(interpreter: ModuleType) -> None:
    """Changes `triton.runtime.interpreter`; leaves it alone where it isn't made as in Triton 3.6 to 3.8."""
    if not {"GridExecutor", "_LangPatchScope", "_patch_lang", "_get_np_dtype", "tl"} <= vars(interpreter).keys():
        return
    builder = interpreter.interpreter_builder
    BEFORE["_patch_lang"] = interpreter._patch_lang
    BEFORE["_get_np_dtype"] = interpreter._get_np_dtype
    BEFORE["GridExecutor.__call__"] = interpreter.GridExecutor.__call__
    BEFORE["interpreter_builder.options"] = builder.options
    replace_once_per_launch(interpreter)
    look_up, known = interpreter._get_np_dtype, {}

    def dtype_of(type_: Any) -> Any:
        name = type_.scalar.name
        if name not in known:
            known[name] = look_up(type_)
        return known[name]

    interpreter._get_np_dtype = dtype_of
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def replace_once_per_launch(interpreter: ModuleType) -> None:
    """Has a launch replace each module of the language once."""
    replace, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    language = (interpreter.tl, interpreter.tl.core)
    replaced: set[ModuleType] = set()  # in the launch that runs

    @functools.cache
    def modules(fn: Any) -> frozenset[ModuleType]:
        return frozenset(value for value in fn.__globals__.values() if any(value is module for module in language))

    def replace_what_is_new(fn: Any) -> Any:
        if modules(fn) <= replaced:
            return interpreter._LangPatchScope()
        replaced.update(modules(fn))
        return replace(fn)

    def launch_anew(self: Any, *args: Any, **kwargs: Any) -> Any:
        replaced.clear()
        try:
            return launch(self, *args, **kwargs)
        finally:
            replaced.clear()

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = replace_what_is_new, launch_anew
