"""Reads a page as a browser does; fails on scripts, links elsewhere, and tags that do not match."""

from __future__ import annotations

from html.parser import HTMLParser

TAGS = {
    *("html", "head", "meta", "title", "style", "body", "main", "header", "footer", "section", "h1", "h2", "p", "div"),
    *("span", "b", "i", "small", "ul", "li", "dl", "dt", "dd", "code", "pre", "a", "br", "figure", "figcaption"),
    *("table", "caption", "thead", "tbody", "tr", "th", "td", "details", "summary", "progress"),
    *("svg", "desc", "path", "rect"),
}
ATTRIBUTES = {
    *("lang", "charset", "http-equiv", "content", "name", "class", "id", "href", "style", "scope", "tabindex", "role"),
    *("dir", "aria-label", "aria-hidden", "value", "max", "viewbox", "preserveaspectratio", "d", "x", "y"),
    *("width", "height"),
}


class Page(HTMLParser):
    """The tags, texts and attributes of a page. Raises AssertionError on anything that is not listed above."""

    def __init__(self, content: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.texts: list[str] = []
        self.tags: list[str] = []
        self.styles: list[str] = []
        self.paths: list[tuple[str, str]] = []  # class, commands
        self._titled = True
        self.feed(content)
        self.close()
        assert self.open == []

    @property
    def text(self) -> str:
        return "\n".join(self.texts)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in TAGS, tag
        for name, value in attrs:
            assert name in ATTRIBUTES, (tag, name)
            if name == "href":
                assert value
                assert value.startswith("#"), value
        self.tags.append(tag)
        found = dict(attrs)
        if tag == "path":
            self.paths.append((found.get("class") or "", found["d"] or ""))
        if tag == "svg":
            self._titled = False
            assert found["role"] == "img"
            assert found["aria-label"]
        if tag == "title":
            self._titled = True
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in ("path", "rect"), f"HTML does not close <{tag}/>"
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag == "svg":
            assert self._titled

    def handle_data(self, data: str) -> None:
        (self.styles if self.open and self.open[-1] == "style" else self.texts).append(data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data}")
