"""What `make docs` does beside mkdocs: fits docstrings, exports and tables of tele_jax to a site.

mkdocs calls on_page_markdown for every page of docs/; griffe, which reads the sources, calls the methods of Site.
"""

import re
from collections.abc import Iterator

from griffe import Alias, Extension, Module

# Code in a page: between backticks, in one line.
_SPAN = re.compile(r"`[^`\n]+`")
# A paragraph that begins with an example, or has three spaces inside a line.
_CODE = re.compile(r"^ *>>> |\S {3,}\S", re.MULTILINE)


def on_page_markdown(markdown: str, **_) -> str:
    r"""Removes the backslash before | in code: inside a table GitHub needs it, and Python-Markdown would show it."""
    return _SPAN.sub(lambda code: code.group().replace(r"\|", "|"), markdown)


def fence(text: str) -> str:
    r"""Puts every paragraph of code of a docstring inside a fence; indented text is code to Markdown already.

    Docstrings are written to be read in an editor: an example begins with >>>, and a list of calls has its remarks in a
    column. Markdown would make quotations and a paragraph of them.

    >>> fence("Doubles.\n\n>>> double(2)\n4").splitlines()
    ['Doubles.', '', '```python', '>>> double(2)', '4', '```']
    """
    return "\n\n".join(f"```python\n{one}\n```" if _is_code(one) else one for one in re.split(r"\n{2,}", text))


def _is_code(paragraph: str) -> bool:
    is_section = re.match(r"\w+:\n", paragraph)  # Args: and the like
    return bool(_CODE.search(paragraph)) and not is_section and not paragraph.startswith("    ")


def _modules(module: Module) -> Iterator[Module]:
    yield module
    for member in module.members.values():
        if not member.is_alias and member.is_module:
            yield from _modules(member)


class Site(Extension):
    """Changes what griffe has read, before mkdocstrings renders it."""

    def on_object(self, *, obj, **_):
        """Fences the docstring of an object."""
        if obj.docstring is not None:
            obj.docstring.value = fence(obj.docstring.value)

    def on_package(self, *, pkg, loader, **_):
        """Shows an exported function that has the name of a module of its package, such as growth.plan.

        Python binds the name to the function, because `__init__` imports it last; griffe binds it to the module.
        """
        loader.resolve_aliases()
        hidden = [
            (module, name, loader.modules_collection[module.imports[name]])
            for module in _modules(pkg)
            for name in map(str, module.exports or ())
            if name in module.imports and not module.members[name].is_alias
        ]
        for module, name, function in hidden:
            module.members[name] = Alias(name, function, parent=module)
