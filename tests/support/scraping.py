"""Reading a `/metrics` page as Prometheus does: by HTTP, into names, labels and values."""

import urllib.request
from collections.abc import Mapping

from prometheus_client.parser import text_string_to_metric_families

# A proxy of the environment must not be asked for what runs here.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))

Values = Mapping[tuple[str, tuple[tuple[str, str], ...]], float]


def scrape(url: str, *, token: str = "") -> str:
    """The page's text."""
    return _ask(urllib.request.Request(url), token)


def counters(text: str) -> Values:
    """All that may never fall: counters, and the parts of histograms and summaries."""
    return {
        (one.name, tuple(sorted(one.labels.items()))): one.value
        for family in text_string_to_metric_families(text)
        if family.type in ("counter", "histogram", "summary")
        for one in family.samples
    }


def value(text: str, name: str, **labels: str) -> float:
    """One sample's value, 0 if it is not there."""
    for family in text_string_to_metric_families(text):
        for one in family.samples:
            if one.name == name and labels.items() <= one.labels.items():
                return float(one.value)
    return 0.0


def post(url: str, body: bytes, *, token: str = "") -> str:
    """The answer to a JSON document."""
    return _ask(urllib.request.Request(url, body, {"Content-Type": "application/json"}), token)


def _ask(request: urllib.request.Request, token: str) -> str:
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    with _OPENER.open(request, timeout=10) as answer:
        text: str = answer.read().decode()
        return text
