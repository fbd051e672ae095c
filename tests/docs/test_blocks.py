"""What is taken from a page, and what becomes of it."""

import pytest

from tests.docs.blocks import MarkError, blocks_of, script

PAGE = """\
# Page

```sh
streamrec show NAME [--json]   # a comment
```

<!-- with: NAME=posts VERSION=v1 -->
<!-- before: streamrec worker -->
```sh
streamrec show NAME@VERSION --name NAMES
```

<!-- short: make demo ARGS=few -->
```sh
make demo
```

<!-- not run: needs a cluster -->
```sh
make everything
```

- in a list

  ```python
  if True:
      print(1)
  ```

```json
{"no": "command"}
```
"""


def test_blocks_run_in_order_with_what_stands_for_what() -> None:
    made = script(blocks_of(PAGE), places={"NAME": "friends"}, long=False)
    assert made == (
        "at 3\nstreamrec show friends   # a comment\n\n"
        "at 9\nstreamrec worker\nstreamrec show posts@v1 --name NAMES\n\n"
        "at 14\nmake demo ARGS=few\n"
        "at 25\npython - <<'END_OF_BLOCK'\nif True:\n    print(1)\nEND_OF_BLOCK\n"
    )


def test_the_long_form_runs_what_the_page_says() -> None:
    assert "\nmake demo\n" in script(blocks_of(PAGE), places={}, long=True)
    assert "everything" not in script(blocks_of(PAGE), places={}, long=True)


def test_a_mark_belongs_to_a_block() -> None:
    with pytest.raises(MarkError, match="not right before"):
        blocks_of("<!-- not run: no reason at all -->\ntext\n```sh\nls\n```\n")


def test_commands_without_a_language_are_noticed() -> None:
    (block,) = blocks_of("```\nstreamrec worker\n```\n")
    assert block.has_unrun_command
    (block,) = blocks_of("```\n  events  100,000\n```\n")
    assert not block.has_unrun_command
