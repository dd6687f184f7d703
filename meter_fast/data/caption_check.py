"""The check of a text before it is used: valid Unicode that holds something visible. Knows no tokenizer."""


class BadCaption(ValueError):
    """A caption that cannot be used. `cause` is counted: "empty caption", "not UTF-8"."""

    def __init__(self, cause: str, detail: str = "") -> None:
        super().__init__(f"{cause}: {detail}" if detail else cause)
        self.cause = cause
        self.detail = detail


def check_caption(text: str | bytes) -> str:
    """The caption as valid Unicode. Raises BadCaption when it is not, or when it holds nothing visible."""
    try:
        if isinstance(text, str):
            text.encode("utf-8")  # a lone surrogate, as from a broken JSON escape, is no text
        else:
            text = bytes(text).decode("utf-8")
    except UnicodeError as error:
        raise BadCaption("not UTF-8", str(error)[:120]) from None
    if not any(character.isprintable() and not character.isspace() for character in text):
        raise BadCaption("empty caption", f"{text[:20]!r} holds no visible character")
    return text
