"""The site's files, made from its log and evidence; those that are as they should be are not touched."""

from pathlib import Path

from weighbridge.publish.badge import badge
from weighbridge.publish.documents import documents
from weighbridge.publish.feed import feed
from weighbridge.publish.pages import pages
from weighbridge.publish.site import Site

SIGNER = "signer.pub"


def files_of(site: Site) -> dict[str, bytes]:
    """Every file of a site that is made from its log and evidence, by its path from the root."""
    files = {**pages(site), **documents(site), "feed.atom": feed(site)}
    files |= {f"endpoints/{page.slug}/badge.svg": badge(page) for page in site.endpoints}
    if site.settings.signer is not None:
        files[SIGNER] = site.settings.signer.line.encode()
    return files


def build_site(root: Path, site: Site) -> int:
    """Write every file that is not as it should be; returns how many were written."""
    written = 0
    for name, data in sorted(files_of(site).items()):
        path = root / name
        if not path.exists() or path.read_bytes() != data:
            _write(path, data)
            written += 1
    return written


def _write(path: Path, data: bytes) -> None:
    """Pages can be made again, so they are not synced one by one; a reader sees the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_bytes(data)
    temporary.replace(path)
