"""The one exception this software raises for what a user gave it."""

import os


def escape(path: str | bytes | os.PathLike) -> str:
    """A file name as one printable line: control characters and undecodable bytes become escapes."""
    text = os.fsdecode(path)
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


class SDRError(Exception):
    """A bad file, checkpoint or setting, said in one line.

    Args:
        file: the file at fault; shown escaped, so that a newline in a name cannot forge a line of output.
        what: what is wrong with it, without the file's name.
        hint: what the user can do about it.
        again: a fault of the machine, so that the same file may do later.
    """

    def __init__(self, file: str | bytes | os.PathLike, what: str, hint: str = "", *, again: bool = False) -> None:
        self.file, self.what, self.hint, self.again = file, what, hint, again
        super().__init__(file, what, hint)

    @property
    def reason(self) -> str:
        """``what (hint)``: the line without the file's name, escaped as that, since both may quote the file."""
        return escape(f"{self.what} ({self.hint})" if self.hint else self.what)

    def __str__(self) -> str:
        return f"{escape(self.file)}: {self.reason}"
