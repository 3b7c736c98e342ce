"""Names from outside: image files, links."""

from __future__ import annotations

import pytest
from yarl import URL

from instella_ray.data.formats.names import image_extension, web_url


def test_endings_of_image_files() -> None:
    assert image_extension("x/y.JPG") == "jpg" and image_extension("y.jfif") == "jfif"
    assert image_extension("y.txt") is None and image_extension("png") is None and image_extension("d.png.tmp") is None


@pytest.mark.parametrize(
    ("link", "expected"),
    [
        (" http://a.org/b.jpg ", "http://a.org/b.jpg"),
        ("https://user:secret@a.org/b#part", "https://a.org/b"),
        ("ftp://a.org/b.jpg", None),
        ("file:///etc/passwd", None),
        ("http:///b.jpg", None),
        ("b.jpg", None),
        ("http://a.org:99999/b.jpg", None),
        ("", None),
        # What is encoded stays, as servers sign it; what a URL may not hold is encoded.
        (
            "http://a.org/x%2Fy%27/%c3%bc?u=https%3A%2F%2Fb%2Fc&s=a%2Bb",
            "http://a.org/x%2Fy%27/%c3%bc?u=https%3A%2F%2Fb%2Fc&s=a%2Bb",
        ),
        ("http://a.org/a b/ü.jpg?q=1 2|3#x", "http://a.org/a%20b/%C3%BC.jpg?q=1%202%7C3"),
        ("http://a.org/100%/%zz.jpg", "http://a.org/100%25/%25zz.jpg"),
        ("http://ü.org/a.jpg", "http://xn--tda.org/a.jpg"),
        ("http://[::1]:8080/a[1].jpg", "http://[::1]:8080/a[1].jpg"),
        ("http://a.org?q=%2F", "http://a.org/?q=%2F"),
    ],
)
def test_links(link: str, expected: str | None) -> None:
    found = web_url(link)
    assert (found and str(found)) == expected


def test_a_link_may_be_relative_to_where_it_stands() -> None:
    base = URL("http://a.org/x/y/b")
    assert web_url("../c.jpg", base) == URL("http://a.org/x/c.jpg")
    assert str(web_url("/c%2Fd.jpg?u=%3A", base)) == "http://a.org/c%2Fd.jpg?u=%3A"
    assert str(web_url("//b.org/c%2Fd.jpg", base)) == "http://b.org/c%2Fd.jpg"
