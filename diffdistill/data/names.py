"""Files' names as tables give them: matched exactly first, then as Unicode text.

"cafe" with an accent can be one character or two (NFC, NFD; Unicode Standard Annex 15). They look the same; macOS and
some archivers write the second, keyboards the first.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from unicodedata import normalize

from diffdistill.data.collection import listed
from diffdistill.data.files import without_common_folders


def composed(name: str) -> str:
    """The name in the form by which two that look the same are compared."""
    return normalize("NFC", name)


def match_names(
    names: Sequence[str], known: Collection[str], *, origin: str, shortens: bool = True
) -> tuple[list[str | None], list[str]]:
    """Of each name the one in `known` that means it, or None; and what the user should know.

    A name means itself, or, if it `shortens`, itself without the folders that all names share; else the only one that
    is the same text, where it is the only name to ask for that.
    """
    tried = list(zip(names, without_common_folders(names) if shortens else names, strict=True))
    found = [next((name for name in pair if name in known), None) for pair in tried]
    forms: dict[str, list[str]] = {}
    for name in known if None in found else ():
        forms.setdefault(composed(name), []).append(name)
    asked = Counter(composed(name) for name in names) if forms else Counter()
    differing = []
    for place, pair in enumerate(tried):
        if found[place] is None and asked[composed(pair[0])] == 1:
            alike = next((forms[form] for form in map(composed, pair) if form in forms), [])
            if len(alike) == 1:
                found[place] = alike[0]
                differing.append(pair[0])
    if not differing:
        return found, []
    what = f"{len(differing):,} names differ from their files' in Unicode normalisation alone, and are taken for them"
    return found, [f"{origin}: {what}: {listed(differing)}"]


def find_name(named: str, known: Collection[str]) -> str | None:
    """The one in `known` that is `named`, or the only one that is the same text."""
    (found,), _ = match_names([named], known, origin="", shortens=False)
    return found


def nearest(missing: Sequence[str], known: Mapping[str, object], used: Collection[str | None]) -> str:
    """For a message that names files without a row: what the table has in their place."""
    forms = {composed(name) for name in missing}
    rest = [name for name in known if name not in used]
    alike = [name for name in known if composed(name) in forms]
    if alike:
        told = ", ".join(ascii(name) for name in alike[:3])
        return f"; the table has {told}, which differs in Unicode normalisation alone and is not the only one"
    if not known:
        return "; the table has no rows"
    return (
        f"; the table's rows without an image are {listed(rest)}" if rest else "; all rows of the table have an image"
    )
