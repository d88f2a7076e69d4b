"""What users typed, and what other programs say, as a part of a message of ours."""

import re


def printable(text: str) -> str:
    """`text` with what cannot be printed escaped: line ends, terminal codes, undecodable bytes of file names."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def one_line(what: object, longest: int = 200) -> str:
    """`str(what)` as one printable line, cut in the middle if it is endless."""
    text = printable(re.sub(r"\s*[\r\n]\s*", " ", str(what)).strip())
    return text if len(text) <= longest else f"{text[: longest // 2]} ... {text[-longest // 3 :]}"
