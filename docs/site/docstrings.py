"""Lets the pages of names show `Example:` in a docstring as code, as Google's style does with `Examples:`."""

from __future__ import annotations

import re
from typing import Any

import griffe


class AsExamples(griffe.Extension):
    """Renames the heading where a docstring is read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for each module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
