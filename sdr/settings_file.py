"""Configuration files, looked through before the parser of the command line reads them.

That parser imports what a file names as a class, opens what it names as another file, and follows aliases, of which a
file of 200 bytes can make a billion values. Settings need none of that, so it is refused.
"""

import os
from collections.abc import Iterator

from sdr.datasets import read_regular, shorten
from sdr.errors import SDRError

MAX_BYTES = 1 << 16  # of a file; that of a run has 3 kB
MAX_DEPTH = 8  # of lists and mappings in one another; settings have 3
MAX_SCALAR = 4096  # letters of one value
CODE = {"class_path", "init_args"}  # what the parser takes for something to import
OTHERS = {"config", "print_config", "help", "debug"}  # options of the command line that are no settings


def read_settings_file(source: str, sections: tuple[str, ...] = ()) -> dict:
    """What a configuration file says.

    Args:
        source: path of a YAML or JSON file, or where there is none, its text.
        sections: names that must hold settings, and not the path of another file.

    Raises:
        SDRError: unreadable, too large or deep, not a mapping of settings, with a key twice, an alias or a tag, or
            naming a class or another file.
    """
    import yaml

    is_file = len(source) < MAX_BYTES and "\0" not in source and os.path.lexists(source)
    name = source if is_file else "--config"
    try:
        text = read_regular(source, MAX_BYTES).decode("utf-8") if is_file else source
        if len(text) > MAX_BYTES:
            raise SDRError(name, f"is larger than {MAX_BYTES} bytes")
        for problem in problems(yaml.parse(text, Loader=yaml.SafeLoader)):
            raise SDRError(name, problem)
        found = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f" in line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or getattr(error, "reason", None) or type(error).__name__
        raise SDRError(name, f"is not YAML{place}: {shorten(reason)}") from error
    if found is None:
        return {}
    if not isinstance(found, dict) and not is_file:
        raise SDRError(source[:MAX_SCALAR], "no such configuration file")
    if not isinstance(found, dict):
        raise SDRError(name, f"must hold settings by name, got {shorten(found)}")
    refuse_names(name, found, sections)
    return found


def problems(events: Iterator) -> Iterator[str]:
    """What makes a document other than plain settings, in the order of its parts."""
    import yaml

    within: list[set[str] | None] = []  # of each open mapping its keys, of a list None
    key_is_next: list[bool] = []
    documents = 0
    for event in events:
        line = f"line {event.start_mark.line + 1}"
        if isinstance(event, yaml.DocumentStartEvent) and (documents := documents + 1) > 1:
            yield f"has two documents, the second in {line}"
        if getattr(event, "anchor", None) is not None:
            yield f"has an anchor or alias in {line}: settings are written out"
        if getattr(event, "tag", None) is not None:
            yield f"has a tag in {line}: no code is taken from a file"
        if isinstance(event, yaml.ScalarEvent) and len(event.value) > MAX_SCALAR:
            yield f"has a value of {len(event.value)} letters in {line}"
        if isinstance(event, yaml.CollectionEndEvent):
            within.pop()
            key_is_next.pop()
            continue
        if not isinstance(event, yaml.NodeEvent):
            continue
        if within and within[-1] is not None:
            if key_is_next[-1]:
                if not isinstance(event, yaml.ScalarEvent):
                    yield f"has a key that is no name in {line}"
                    return
                if event.value in within[-1]:
                    yield f"has {shorten(event.value)} twice, again in {line}"
                within[-1].add(event.value)
            key_is_next[-1] = not key_is_next[-1]
        if isinstance(event, yaml.CollectionStartEvent):
            within.append(set() if isinstance(event, yaml.MappingStartEvent) else None)
            key_is_next.append(True)
            if len(within) > MAX_DEPTH:
                yield f"is nested more than {MAX_DEPTH} deep in {line}"


def refuse_names(path: str, found: dict, sections: tuple[str, ...]) -> None:
    """Raise SDRError where settings name something to import or another file."""
    for name, value in found.items():
        if not isinstance(name, str):
            raise SDRError(path, f"has {shorten(name)} in the place of a name")
        if name in OTHERS and value not in (None, False):
            raise SDRError(path, f"has {name}, which is for the command line alone")
        if name in sections and not isinstance(value, dict):
            raise SDRError(path, f"must hold settings under {name}, got {shorten(value)}")
        if any(isinstance(part, int) and part.bit_length() > 63 for part in values_of(value)):
            raise SDRError(path, f"has a number of over 63 bits under {shorten(name)}")
        if named := CODE & {part for key in (name, *keys_of(value)) for part in key.split(".")}:
            raise SDRError(path, f"has {min(named)} under {shorten(name)}: no code is taken from a file")


def values_of(value: object) -> Iterator[object]:
    """A value and every one within it."""
    yield value
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from values_of(part)


def keys_of(value: object) -> Iterator[str]:
    """Every key within a value."""
    return (str(key) for part in values_of(value) if isinstance(part, dict) for key in part)
