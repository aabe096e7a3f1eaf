"""Drop the Sphinx roles of docstrings, such as :func:, from the pages; the names that follow them stay."""

import re
from typing import Any

_ROLE = re.compile(r":(?:func|class|meth|mod|data|attr|exc):(<code>)~?")


def on_page_content(content: str, **_context: Any) -> str:
    """Return the page's HTML without roles; MkDocs calls this hook for each page."""
    return _ROLE.sub(r"\1", content)
