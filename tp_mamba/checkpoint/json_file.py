"""Reading the JSON files of a checkpoint; whatever is wrong with one is said with its path."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tp_mamba.checkpoint.errors import CheckpointError
from tp_mamba.quoting import shown, shown_path


def read_json_object(
    path: Path, *, remedy: str = "fetch it again", error: type[CheckpointError] = CheckpointError
) -> dict[str, Any]:
    """The object of fields that the JSON file ``path`` holds.

    Args:
        remedy: what to do about a damaged file, for the end of the sentence.
        error: the type to raise.

    Raises:
        FileNotFoundError: there is no such file; what that means is the caller's to say.
        CheckpointError: (or ``error``) the file cannot be read, is not JSON in UTF-8, is nested too deeply, or
            holds something other than an object.
    """
    where = shown_path(path)
    try:
        content = json.loads(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        raise
    except OSError as failure:
        raise error(f"{where} cannot be read ({failure.strerror or shown(failure)}): {remedy}") from failure
    except ValueError as failure:  # JSONDecodeError, UnicodeDecodeError, an integer of too many digits
        raise error(f"{where} is not JSON ({shown(failure)}): {remedy}") from None
    except RecursionError:
        raise error(f"{where} is not JSON that can be read (nested too deeply): {remedy}") from None
    if not isinstance(content, dict):
        raise error(
            f"{where} holds a JSON {type(content).__name__}, it must be an object of fields: {remedy}"
        )
    return content
