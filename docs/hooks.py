"""What MkDocs calls: the methods' pages are those in their folder, and the site loads nothing from another host."""

import re
from pathlib import Path
from typing import Any

LOADED = re.compile(
    r"""<(?:script|img|iframe|source|video|audio|embed)\b[^>]*?\ssrc=["']?((?:https?:)?//[^"'\s>]+)"""
    r"""|<link\b(?=[^>]*\brel=["']?(?:stylesheet|preconnect|preload|icon))[^>]*?\shref=["']?((?:https?:)?//[^"'\s>]+)"""
    r"""|(?:@import\s+(?:url\()?|url\()["']?((?:https?:)?//[^"')\s]+)"""
)


def on_config(config: Any) -> Any:
    """Put the pages of docs/methods under "Methods"."""
    pages = sorted(Path(config["docs_dir"], "methods").glob("*.md"))
    [group] = [entry["Methods"] for entry in config["nav"] if "Methods" in entry]
    group[:0] = [{page.stem: f"methods/{page.name}"} for page in pages]
    return config


def on_post_build(config: Any) -> None:
    """Raise ValueError, naming page and address, if a page would ask another host for anything."""
    site = Path(config["site_dir"])
    for file in sorted([*site.rglob("*.html"), *site.rglob("*.css")]):
        found = foreign(file.read_text(encoding="utf-8"))
        if found:
            raise ValueError(f"{file.relative_to(site)} loads {found[0]} from another host")


def foreign(text: str) -> list[str]:
    """The addresses on other hosts that a browser fetches by itself; plain links are none."""
    return [next(filter(None, groups)) for groups in LOADED.findall(text)]
