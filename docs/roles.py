"""Roles in docstrings, such as ``:class:`sdr.model.SDRModel` ``, to links of the API pages: a griffe extension."""

import re
from typing import Any

from griffe import Extension, Object

ROLE = re.compile(r":(?:class|func|meth|mod):`([^`]+)`")


def link(role: re.Match) -> str:
    """A link where the name has a page, else the name alone."""
    name = role[1]
    return f"<autoref optional identifier={name!r}><code>{name}</code></autoref>"


class Roles(Extension):
    """Rewrites every docstring before it is parsed."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = ROLE.sub(link, obj.docstring.value)
