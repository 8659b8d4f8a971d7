"""Patterns over layer names: globs, or regular expressions after `re:`. One grammar for every option that names layers.

>>> Patterns("exclude", ["layer1.*", "re:.*downsample.*"]).match(["layer4.0.downsample.0"])
're:.*downsample.*'
"""

import difflib
import fnmatch
import re
from collections.abc import Iterable

from sphereify.errors import invalid, refused

PatternList = str | Iterable[str] | None
"""Values of an option over layer names: one pattern, several, or none."""


class Patterns:
    """Globs (`layer1.*`) or regular expressions (`re:layer[12].*`) that must match a whole name.

    Args:
        name: the option that they were given to, for its errors.
        patterns: one pattern, several, or None.

    Raises:
        UsageError: something else than strings, or a text after `re:` that is no regular expression.
    """

    def __init__(self, name: str, patterns: PatternList):
        if not isinstance(patterns, (str, Iterable, type(None))):
            raise invalid(name, patterns, "a pattern or a list of patterns over layer names")
        self.name = name
        self.patterns = [patterns] if isinstance(patterns, str) else list(patterns or [])
        self._compiled = {pattern: self._compile(pattern) for pattern in self.patterns}

    def __bool__(self) -> bool:
        return bool(self.patterns)

    def match(self, names: Iterable[str]) -> str | None:
        """The first pattern that matches one of `names`."""
        names = list(names)
        return next((p for p, c in self._compiled.items() if any(c.fullmatch(name) for name in names)), None)

    def check(self, names: Iterable[str], what: str = "convolution or linear layer") -> None:
        """Make sure that each pattern matches one of `names`.

        Raises:
            UsageError: a pattern without a match, with the names that come close. `what` says what the names are of.
        """
        names = list(names)
        for pattern, compiled in self._compiled.items():
            if any(compiled.fullmatch(name) for name in names):
                continue
            inside = any(name.startswith(pattern + ".") for name in names)
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3) or names[:3]
            hint = f"did you mean {pattern + '.*'!r}?" if inside else f"names look like {', '.join(near)}"
            raise refused(self.name, f"pattern {pattern!r} matches no {what}; {hint}")

    def _compile(self, pattern: str) -> re.Pattern[str]:
        if not isinstance(pattern, str):
            raise invalid(self.name, pattern, "a glob over layer names, or 're:…'")
        if not pattern.startswith("re:"):
            return re.compile(fnmatch.translate(pattern))
        try:
            return re.compile(pattern[3:])
        except re.error as error:
            raise refused(self.name, f"{pattern!r} is not a regular expression: {error}") from None


def pattern_of(name: str) -> str:
    """A pattern for one layer: its name, or a regular expression where the name would be read as a glob."""
    return f"re:{re.escape(name)}" if set(name) & set("*?[]") else name
