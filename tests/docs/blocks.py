"""Commands in Markdown, and what the page says about running them. No I/O.

A page's `sh` and `python` blocks run in order. A comment right before a block says what a reader
need not see:

    <!-- with: VERSION=20261124T2352Z-int8 -->   from here on, this stands for that
    <!-- less: 500=20 -->                        likewise, but for `make docs-check`
    <!-- before: streamrec worker -->            run this first
    <!-- short: make demo ARGS="--events 2000" --> in place of the block, but for `make docs-check`
    <!-- instead: make -n test -->               in place of the block, always
    <!-- not run: needs a cluster -->            why it cannot be run
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

#: Languages that are run; others are looked at for commands without one.
RUN = ("sh", "python")
_PART = re.compile(
    r"^(?P<indent> *)```(?P<language>\w*)\n(?P<body>.*?)^ *```$"
    r"|<!--\s*(?P<comment>.*?)\s*-->|(?P<other>\S)",
    re.DOTALL | re.MULTILINE,
)
_MARK = re.compile(r"(with|less|before|short|instead|not run):\s*(.*)", re.DOTALL)
_COMMAND = re.compile(r"^\s*(?:\$ )?(?:streamrec|make|pip|curl|kubectl|helm|docker) ", re.MULTILINE)
#: An optional part of a synopsis, such as ` [--to VERSION]`.
_OPTIONAL = re.compile(r" \[[^\]\n]*\]")


class MarkError(ValueError):
    """A comment before a block says nothing that is known."""


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block."""

    line: int
    language: str
    body: str
    marks: Mapping[str, str] = field(default_factory=dict)

    @property
    def reason_not_run(self) -> str | None:
        """Why it is not run; None where it is."""
        return self.marks.get("not run")

    @property
    def has_unrun_command(self) -> bool:
        """Whether it looks like commands and is not labelled so."""
        return not self.language and _COMMAND.search(self.body) is not None


def blocks_of(page: str) -> list[Block]:
    """The fenced blocks of a page, in order.

    Raises:
        MarkError: a comment has a mark's form and an unknown name, or misses its block.
    """
    found: list[Block] = []
    marks: dict[str, str] = {}
    for part in _PART.finditer(page):
        comment = part["comment"]
        if comment is not None:
            mark = _MARK.fullmatch(comment)
            if mark is not None:
                marks[mark[1]] = mark[2].strip()
        elif part["body"] is not None:
            line = page.count("\n", 0, part.start()) + 1
            indent = part["indent"]
            body = re.sub(f"^{indent}", "", part["body"], flags=re.MULTILINE)
            found.append(Block(line, part["language"], body, marks))
            marks = {}
        elif marks:
            raise MarkError(f"{marks} is not right before a block")
    return found


def script(blocks: list[Block], *, places: Mapping[str, str], long: bool) -> str:
    """One shell script of all that a page has to run; each block says where it is.

    Args:
        places: what stands for what on every page.
        long: blocks as they are where there is a shorter form.
    """
    known = dict(places)
    parts = []
    for block in blocks:
        for mark in ("with",) if long else ("with", "less"):
            known |= dict(pair.split("=", 1) for pair in block.marks.get(mark, "").split())
        if block.language not in RUN or block.reason_not_run is not None:
            continue
        lines = [f"at {block.line}"]
        if "before" in block.marks:
            lines.append(_replaced(block.marks["before"], known))
        instead = block.marks.get("instead") or (None if long else block.marks.get("short"))
        if instead is not None:
            lines.append(_replaced(instead, known))
        elif block.language == "python":
            lines.append(f"python - <<'END_OF_BLOCK'\n{_replaced(block.body, known)}END_OF_BLOCK")
        else:
            lines.append(_replaced(_OPTIONAL.sub("", block.body), known))
        parts.append("\n".join(lines))
    return "\n".join(parts) + "\n"


def _replaced(text: str, known: Mapping[str, str]) -> str:
    """Longer names first, each where it is no part of a longer word."""
    for name in sorted(known, key=len, reverse=True):
        text = re.sub(rf"(?<![\w-]){re.escape(name)}(?![\w-])", lambda _: known[name], text)  # noqa: B023
    return text
