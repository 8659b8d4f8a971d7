"""The reference of the messages: the errors by class, and every message that the package can give."""

import inspect
from collections import defaultdict

from documentation.messages import ERRORS, error_messages


def classes() -> str:
    """A table of the classes of errors, in Markdown."""
    rows = [
        f"| `{name}` | {getattr(error, 'exit_code', '')} | {(inspect.getdoc(error) or '').partition(chr(10) * 2)[0]} |"
        for name, error in ERRORS.items()
        if name not in ("SphereifyError", "Interrupted")
    ]
    return "\n".join(["| class | exit code | what can be done |", "|---|---|---|", *rows])


def page() -> str:
    """The page of all messages of errors, in Markdown, by class and module."""
    lines = [
        "# Messages",
        "",
        "Every message that an error of this package begins with, read off its source. `…` stands for what is filled "
        "in; options are spelled as in Python (`batch_size`), where the command line has `--batch-size`. What to do "
        "about those that are met most is in [Troubleshooting](troubleshooting.md).",
    ]
    by_class: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for message in error_messages():
        texts = by_class[message.error][message.place]
        if message.text not in texts:
            texts.append(message.text)
    for name in ERRORS:
        if name in by_class:
            lines += ["", f"## {name}", "", inspect.getdoc(ERRORS[name]) or "", ""]
            for place, texts in by_class[name].items():
                lines += [f"`{place}`", "", *(f"- `` {text} ``" for text in texts), ""]
    return "\n".join(lines) + "\n"
