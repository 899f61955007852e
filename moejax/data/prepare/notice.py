"""Whose work emoji3m is made of: the licences in dataset.json and the text of NOTICE."""

import tarfile
from pathlib import Path

from moejax.data.prepare.packages import FLUENT, NAMES, NOTO, OPENMOJI, TWEMOJI, read_member

LICENCES = (
    {
        "what": "pictures, style noto",
        "work": "Noto Emoji, Copyright Google Inc.",
        "url": "https://github.com/googlefonts/noto-emoji",
        "licence": "Apache-2.0",
        "licence_url": "https://www.apache.org/licenses/LICENSE-2.0",
        "package": NOTO.spec,
    },
    {
        "what": "pictures, style twemoji",
        "work": "Twemoji, Copyright Twitter, Inc and other contributors",
        "url": "https://github.com/jdecked/twemoji",
        "licence": "CC-BY-4.0",
        "licence_url": "https://creativecommons.org/licenses/by/4.0/",
        "package": TWEMOJI.spec,
    },
    {
        "what": "pictures, style openmoji",
        "work": "OpenMoji, the open-source emoji and icon project, by HfG Schwaebisch Gmuend and "
        "contributors",
        "url": "https://openmoji.org",
        "licence": "CC-BY-SA-4.0",
        "licence_url": "https://creativecommons.org/licenses/by-sa/4.0/",
        "package": OPENMOJI.spec,
    },
    {
        "what": "pictures, style fluent",
        "work": "Fluent Emoji, Copyright Microsoft Corporation",
        "url": "https://github.com/microsoft/fluentui-emoji",
        "licence": "MIT",
        "licence_url": "https://github.com/microsoft/fluentui-emoji/blob/main/LICENSE",
        "package": FLUENT.spec,
    },
    {
        "what": "code points, categories and order",
        "work": "emoji-data, Copyright Cal Henderson",
        "url": "https://github.com/iamcal/emoji-data",
        "licence": "MIT",
        "licence_url": "https://github.com/iamcal/emoji-data/blob/master/LICENSE",
        "package": NOTO.spec,
    },
    {
        "what": "names and keywords, and the texts that are spoken",
        "work": "Unicode CLDR, Copyright Unicode, Inc.",
        "url": "https://cldr.unicode.org",
        "licence": "Unicode-3.0",
        "licence_url": "https://www.unicode.org/license.txt",
        "package": NAMES.spec,
    },
)


def notice(packages: Path) -> str:
    """The text of NOTICE, with the licences that ask for their own text to be copied."""
    with tarfile.open(packages / NOTO.file) as archive:
        mit = read_member(archive, "package/LICENSE").decode()
    with tarfile.open(packages / NAMES.file) as archive:
        unicode_licence = read_member(archive, "package/LICENSE").decode()
    works = "\n".join(
        f"- {row['what']}: {row['work']}, {row['url']}.\n"
        f"  {row['licence']}, {row['licence_url']}. Package: {row['package']}."
        for row in LICENCES
    )
    terms = mit[mit.index("Permission is hereby granted") :]
    return f"""\
Third-party material in this folder
===================================

This set was made by `moejax prepare emoji3m` from public packages:

{works}

Changes made to the material: the drawings were laid on white and reduced to 32x32 pixels, some were
left out, names and keywords of 12 languages were selected, concept families and splits were added.
The pictures of the style openmoji stay under CC-BY-SA-4.0: whoever passes them on, changed or not,
passes them on under that licence.
The names were spoken by eSpeak NG (https://github.com/espeak-ng/espeak-ng, GPL-3.0-or-later, of
which nothing is contained here); the set holds units of 20 ms, not sound.

emoji-data, MIT License
-----------------------

{mit.strip()}

Fluent Emoji, MIT License
-------------------------

Copyright (c) Microsoft Corporation.

{terms.strip()}

Unicode CLDR, Unicode License V3
--------------------------------

{unicode_licence.strip()}
"""
