"""What setup.py wrote down of the build, `_build.json`, and what of it is not there."""

import json
import sys
from pathlib import Path
from typing import Any

INSTALL = "to build it, type `pip install --no-build-isolation .` in the source folder"
INSTALL_IN_PLACE = INSTALL.replace(" .`", " -e .`")


def read_record(what: str) -> tuple[dict[str, Any], str | None]:
    """What setup.py wrote down of the build, and why `what`, a part of it, is not there."""
    if sys.platform != "linux":
        return {}, f"{what} is built on Linux alone, and this is {sys.platform}"
    path = Path(__file__).parent.with_name("_build.json")
    try:
        record = json.loads(path.read_text())
    except FileNotFoundError:
        return {}, f"{what} was not built; {INSTALL}"
    except (OSError, ValueError) as error:
        return {}, f"{path} cannot be read ({error}); {INSTALL} again"
    part = {"_cuda.so": "cuda", "_emulation.so": "emulation"}.get(what.rpartition("/")[2])
    missing = (
        record.get("missing") if part is None else record.get(part, {"missing": "by an older setup.py"})["missing"]
    )
    if missing and part == "emulation":  # which no wheel has, and no other installation
        return record, f"{what} was not built: {missing}; {INSTALL_IN_PLACE}"
    if missing:
        return record, f"{what} was not built: {missing}; {INSTALL} once that is mended"
    return record, None
