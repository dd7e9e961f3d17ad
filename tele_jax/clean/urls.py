"""One address for the spellings of a page's URL."""

import fnmatch
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

from tele_jax.clean.settings import UrlsConfig


def canonical(url: str, config: UrlsConfig) -> str:
    """The URL without scheme, `www.`, default port, fragment, trailing slash and parameters that name no other page.

    >>> canonical("HTTP://www.Example.org:80/a/?b=2&utm_source=x&a=1#top", UrlsConfig())
    'example.org/a?a=1&b=2'
    """
    try:
        parts = urlsplit(url.strip())
        port = f":{parts.port}" if parts.port and parts.port not in (80, 443) else ""
        host = (parts.hostname or "").removeprefix("www.") + port
    except ValueError:
        return url.strip()
    if not host:
        return url.strip()
    query = [
        (name, value)
        for name, value in parse_qsl(parts.query, keep_blank_values=True)
        if not any(fnmatch.fnmatchcase(name.lower(), pattern) for pattern in config.ignore_query)
    ]
    path = unquote(parts.path).rstrip("/")
    return host + path + (f"?{urlencode(sorted(query))}" if query else "")
