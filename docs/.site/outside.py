"""A hook of MkDocs: what pages link to outside of docs/ becomes part of the site.

In the repository pages stand in docs/ and link to `../examples/x.py`; in the site both stand at the root.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

_ROOT = Path(__file__).parents[2]
_PAGES = ("CHANGELOG.md", "CONTRIBUTING.md")
_OUT = re.compile(r"\]\(\.\./([^)#\s]+)")
_IN = re.compile(r"\]\(docs/")


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages of the root, and every file that a page links to."""
    wanted = {name for page in files.documentation_pages() for name in _OUT.findall(page.content_string)}
    for name in sorted({*_PAGES, *wanted}):
        if (_ROOT / name).is_file() and files.get_file_from_path(name) is None:
            files.append(File.generated(config, name, abs_src_path=str(_ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links as they are in the site. What leads nowhere stays as it is, for MkDocs to complain of."""
    if page.file.src_uri in _PAGES:
        return _IN.sub("](", markdown)
    return _OUT.sub(lambda link: f"]({link[1]}" if (_ROOT / link[1]).is_file() else link[0], markdown)
