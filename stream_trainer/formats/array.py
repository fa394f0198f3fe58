"""The elements of a JSON array, as they stand in it, without holding the whole."""

import json
from collections.abc import Callable, Iterator

FIRST_CHARS = 256 * 1024

_DECODER = json.JSONDecoder(strict=False)  # what it takes is judged as a record later


class FormError(ValueError):
    """A file is not what it should be, and what it is: the rest of a sentence that begins with its name."""


def elements(read: Callable[[int], str]) -> Iterator[str]:
    """The text of each element of the array that `read` gives, so many characters at a time, empty at its end.

    Raises FormError, naming the element, if it is no whole array, or something follows it.
    """
    text = _Text(read)
    if text.after_spaces() != "[":
        raise FormError("is no JSON array")
    text.at += 1
    number, following = 0, "]" if text.after_spaces() == "]" else ","
    while following == ",":
        text.at += number > 0
        number += 1
        yield text.element(number)
        following = text.after_spaces()
    if following != "]":
        raise FormError(f"is no whole JSON array: after element {number} comes neither a comma nor its end")
    text.at += 1
    if text.after_spaces():
        raise FormError(f"goes on after its array of {number} elements; it is neither an array nor one record a line")


class _Text:
    """A window on a long text. `at` is where we are in it."""

    def __init__(self, read: Callable[[int], str]) -> None:
        self._read = read
        self._text = ""
        self.at = 0

    def after_spaces(self) -> str:
        """Go past spaces; the character there, empty at the end."""
        while True:
            while self.at < len(self._text) and self._text[self.at] in " \t\r\n\ufeff":
                self.at += 1
            if self.at < len(self._text) or not self._more(FIRST_CHARS):
                return self._text[self.at : self.at + 1]

    def element(self, number: int) -> str:
        """Go past a value, and return it. Reads twice as much each time it is not whole: so it costs no more."""
        self.after_spaces()
        size = FIRST_CHARS
        while True:
            try:
                _, end = _DECODER.raw_decode(self._text, self.at)
            except (ValueError, RecursionError) as error:
                if not self._more(size):
                    raise FormError(f"is no whole JSON array: element {number} is no JSON") from error
            else:
                # A number may go on where the text was cut.
                if end < len(self._text) or not self._more(size):
                    found = self._text[self.at : end]
                    self.at = end
                    return found
            size *= 2

    def _more(self, size: int) -> bool:
        new = self._read(size)
        self._text = self._text[self.at :] + new
        self.at = 0
        return bool(new)
