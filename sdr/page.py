"""HTML pages that need nothing else: no network, no second file, no server."""

from importlib.resources import files
from pathlib import Path
from typing import Any


def render_page(template: str, *, folder: Path | None = None, **values: Any) -> str:
    """A page: ``template`` extends page.html, which has the style and the scripts that pages share.

    Everything in ``values`` is escaped, and the page forbids itself every network request.

    Args:
        template: name of a file of this package, or of ``folder``.
        folder: of the template, where it is no part of the package.
        values: what the template names.
    """
    from jinja2 import Environment, FunctionLoader, StrictUndefined
    from plotly.offline import get_plotlyjs

    def read(name: str) -> str:
        own = folder is not None and name == template
        return (folder if own else files("sdr")).joinpath(name).read_text(encoding="utf-8")

    pages = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, loader=FunctionLoader(read)
    )
    return pages.get_template(template).render(plotly_js=get_plotlyjs(), **values)
