"""The downloader against a real server that answers slowly, wrongly, hugely, or with lies."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from aiohttp import web

from instella_ray.data.curation import addresses
from instella_ray.data.curation.download import DownloadConfig, Downloader, download_stage
from instella_ray.data.curation.job import CurateConfig, run_curate
from instella_ray.data.formats.patterns import shard_label
from instella_ray.data.formats.rows import SCHEMA
from instella_ray.data.formats.sources import find_inputs, read_rows, shard_sources
from instella_ray.data.pipeline import run_stages
from instella_ray.errors import UserError

from ...kit.image_server import GOOD, ImageServer, serving
from ...kit.shards import image_bytes, sample, tar_bytes

Make = Callable[..., Downloader]


@pytest.fixture
def server() -> Iterator[ImageServer]:
    made = ImageServer()
    with serving(made.handle) as made.port:
        yield made


@pytest.fixture
def make() -> Iterator[Make]:
    """Downloaders with short waits, closed at the end."""
    made: list[Downloader] = []

    def downloader(**settings: Any) -> Downloader:
        quick = {"allow_private": True, "timeout_s": 5, "retries": 1, "backoff_s": 0.01, "max_bytes": 1 << 20}
        made.append(Downloader(DownloadConfig(**quick | settings)))
        return made[-1]

    yield downloader
    for one in made:
        one.close()


def table(*urls: Any, **columns: Any) -> pa.Table:
    base = {"shard": "s", "caption": "an image", "image": None, "problem": None, "last": False, **columns}
    rows = [{**base, "key": str(i), "row": i, "meta": json.dumps({"url": url})} for i, url in enumerate(urls)]
    return pa.Table.from_pylist(rows, SCHEMA)


def results(downloader: Downloader, *urls: Any) -> list[bytes | str]:
    """The image of each link, or what is wrong with its row."""
    rows = downloader(table(*urls)).to_pylist()
    assert all((row["image"] is None) != (row["problem"] is None) for row in rows)
    return [row["image"] or row["problem"].removeprefix("download:") for row in rows]


def test_images_arrive_in_their_rows_and_other_rows_are_left_alone(server: ImageServer, make: Make) -> None:
    done = pa.concat_tables(
        [table(server.url("good")), table(server.url("status/404"), image=b"own"), table("x", problem="no_caption")]
    )
    rows = make()(done)
    assert rows.schema == SCHEMA
    assert [(row["image"], row["problem"]) for row in rows.to_pylist()] == [
        (GOOD, None),
        (b"own", None),
        (None, "no_caption"),
    ]
    assert server.requests == {"good": 1}


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("good", GOOD),
        ("untyped", GOOD),
        ("status/404", "http_404"),
        ("status/410", "http_410"),
        ("status/304", "http_304"),
        ("status/204", "empty"),
        ("huge/announced", "too_large"),
        ("huge/unannounced", "too_large"),
        ("bomb", "too_large"),
        ("compressed/gzip", GOOD),
        ("compressed/br", "content_encoding"),
        ("compressed/deflate", GOOD),
        ("html", "content_type"),
        ("liar", b"<html>gone</html>"),  # which the decoder will find out
        ("cut", "cut_off"),
        ("garbage", "protocol"),
        ("empty", "empty"),
        ("robots/plain", "opt_out"),
        ("robots/list", "opt_out"),
        ("robots/named", "opt_out"),
        ("robots/other", GOOD),
        ("to/good", GOOD),
        ("to/to/good", GOOD),
        ("to/status/404", "http_404"),
        ("to/robots/plain", "opt_out"),
        ("to/?url=file:///etc/passwd", "bad_url"),
        ("loop", "redirects"),
    ],
)
def test_every_answer_is_an_image_or_a_reason_after_one_request(
    server: ImageServer, make: Make, path: str, expected: bytes | str
) -> None:
    assert results(make(max_redirects=3), server.url(path)) == [expected]
    hops = 4 if path == "loop" else 1 + path.count("to/") - ("?" in path)
    assert server.requests.total() == hops


@pytest.mark.parametrize(
    ("path", "expected", "requests"),
    [
        ("status/503", "http_503", 3),
        ("status/429", "http_429", 3),
        ("never", "timeout", 3),
        ("hangup", "connection", 6),  # aiohttp itself asks once more
    ],
)
def test_what_may_pass_is_tried_again_so_often_and_no_more(
    server: ImageServer, make: Make, path: str, expected: str, requests: int
) -> None:
    assert results(make(retries=2, timeout_s=0.2), server.url(path)) == [expected]
    assert server.requests.total() == requests


def test_a_server_that_recovers_gives_its_image(server: ImageServer, make: Make) -> None:
    paths = ["recovers/503", "recovers/429,0", "recovers/500,Wed, 21 Oct 2015 07:28:00 GMT"]
    assert results(make(), *map(server.url, paths)) == [GOOD] * 3


def test_a_wait_that_the_server_asks_for_is_kept_or_its_image_given_up(server: ImageServer, make: Make) -> None:
    assert results(make(max_retry_after_s=2), server.url("recovers/429,3600")) == ["http_429"]
    assert server.requests.total() == 1


def test_waits_grow_and_differ_by_the_link_and_are_as_long_as_the_server_asks_for(
    server: ImageServer, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    sleep = asyncio.sleep
    monkeypatch.setattr(asyncio, "sleep", lambda seconds: slept.append(seconds) or sleep(0))
    downloader = make(retries=3, backoff_s=1)

    def waits(path: str) -> list[float]:
        slept.clear()
        results(downloader, server.url(path))
        return [seconds for seconds in slept if seconds]

    first = waits("status/503")
    assert [0.5 * 2**n <= wait <= 1.5 * 2**n for n, wait in enumerate(first)] == [True] * 3
    assert waits("status/503") == first and waits("status/500") != first
    assert waits("recovers/429,7") == [7]


@pytest.mark.parametrize(
    "url", [None, "", "no link", "ftp://a.b/c.jpg", "http://", "http://a:b:c/", "http://[::1/x", 7]
)
def test_links_that_are_none_cost_their_row(make: Make, url: Any) -> None:
    assert results(make(), url) == ["bad_url"]


def test_a_refused_connection_and_an_unknown_host_are_told_apart(make: Make) -> None:
    with socket.socket() as bound:  # not listening
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
        assert results(make(), f"http://127.0.0.1:{port}/a.jpg", "http://nowhere.invalid/a.jpg") == [
            "connection",
            "dns",
        ]


def test_one_host_gets_few_requests_at_once(server: ImageServer, make: Make) -> None:
    downloader = make(per_host=2, concurrency=8)
    assert results(downloader, *[server.url(f"moment/{i}") for i in range(8)]) == [GOOD] * 8
    assert server.most_at_once == 2
    assert downloader._fetcher._hosts == {}


def test_a_host_that_hangs_does_not_keep_others_waiting(server: ImageServer, make: Make) -> None:
    links = [*(server.url(f"never/{i}") for i in range(3)), server.url("good", "localhost")]
    found = results(make(per_host=1, concurrency=2, timeout_s=0.3, retries=0), *links)
    assert found == [*["timeout"] * 3, GOOD]
    assert list(server.requests) == ["never/0", "good", "never/1", "never/2"]


def test_threads_share_the_limits(server: ImageServer, make: Make) -> None:
    downloader = make(per_host=3)
    with ThreadPoolExecutor(4) as threads:
        tables = threads.map(downloader, [table(*[server.url("moment")] * 4)] * 4)
    assert [image for made in tables for image in made["image"].to_pylist()] == [GOOD] * 16
    assert server.most_at_once == 3


def test_servers_are_told_who_asks_and_get_no_cookies_back(server: ImageServer, make: Make) -> None:
    assert results(make(user_agent="someone (someone@example.org)"), *[server.url("good")] * 2) == [GOOD] * 2
    assert server.headers["User-Agent"] == "someone (someone@example.org)"
    assert server.headers["Accept-Encoding"] == "identity" and "Cookie" not in server.headers


def test_opt_outs_can_be_left_to_the_user(server: ImageServer, make: Make) -> None:
    assert results(make(respect_opt_out=False), server.url("robots/plain")) == [GOOD]


SIGNED = (
    "/_9eOzvEV=/1280x720/smart/http%3A%2F%2Fsite.com%2Fa%27b.jpg",
    "/x.jpg?Expires=1&Signature=qZ0A%2Fd%2BPP2g%3D",
    "/x.jpg?u=https%3a%2f%2fh%2fp.jpg%3Fw%3D1&v=%C3%BC+%41",
)


@pytest.mark.parametrize(
    ("path", "asked"), [*((path, path) for path in SIGNED), ("/a b|.jpg", "/a%20b%7C.jpg"), ("/ü.jpg", "/%C3%BC.jpg")]
)
def test_servers_get_the_text_of_a_link_as_it_is_written(make: Make, path: str, asked: str) -> None:
    async def handle(request: web.Request) -> web.Response:
        if request.path == "/go":
            return web.Response(status=302, headers={"Location": path})
        return web.Response(body=GOOD) if request.raw_path == asked else web.Response(status=403)

    with serving(handle) as port:
        base = f"http://127.0.0.1:{port}"
        assert results(make(), base + path, f"{base}/go") == [GOOD, GOOD]


# --- robots.txt


def test_what_robots_txt_forbids_is_not_asked_for(server: ImageServer, make: Make) -> None:
    server.robots_answers = [(200, "User-agent: *\nDisallow: /good\nAllow: /good/public\nDisallow: /*.gif$\n")]
    paths = ["good", "good/1?x=2", "good/public", "untyped", "untyped/a.gif", "to/good", "to/untyped"]
    found = results(make(), *map(server.url, paths))
    assert found == ["robots", "robots", GOOD, GOOD, "robots", "robots", GOOD]
    assert server.robots_requests == 1 and server.headers["User-Agent"].startswith("instella-ray-dataset")
    assert set(server.requests) == {"good/public", "untyped", "to/good", "to/untyped"}


def test_the_rules_for_this_user_agent_count(server: ImageServer, make: Make) -> None:
    server.robots_answers = [(200, "User-agent: *\nDisallow: /\n\nUser-agent: kind-bot\nDisallow: /private\n")]
    assert results(make(), server.url("good")) == ["robots"]
    kind = make(user_agent="kind-bot/2.0 (someone@example.org)")
    assert results(kind, server.url("good"), server.url("private")) == [GOOD, "robots"]


@pytest.mark.parametrize("answer", [(404, ""), (403, "no"), (200, ""), (200, "<html>no rules</html>"), (204, "")])
def test_without_rules_all_is_allowed(server: ImageServer, make: Make, answer: tuple[int, str]) -> None:
    server.robots_answers = [answer]
    assert results(make(), server.url("good")) == [GOOD]


def test_while_the_rules_cannot_be_had_nothing_is(server: ImageServer, make: Make) -> None:
    server.robots_answers = [(503, "")]
    assert results(make(retries=2), server.url("good"), server.url("good/1")) == ["robots_unreachable"] * 2
    assert not server.requests and 3 <= server.robots_requests <= 6  # shared, where the links wait at the same time
    server.robots_answers, server.robots_requests = [(500, ""), (200, "User-agent: *\nDisallow: /good/1")], 0
    assert results(make(), server.url("good"), server.url("good/1")) == [GOOD, "robots"]


def test_each_server_has_its_own_rules_and_long_ones_are_cut_off(server: ImageServer, make: Make) -> None:
    long = "User-agent: *\nDisallow: /good\n" + "# comment\n" * 60_000 + "Disallow: /untyped\n"
    server.robots_answers = [(200, ""), (200, long)]
    downloader = make()
    assert results(downloader, server.url("good")) == [GOOD]
    links = [server.url(path, "localhost") for path in ("good", "untyped")]
    assert results(downloader, *links) == ["robots", GOOD] and server.robots_requests == 2


def test_robots_txt_can_be_left_to_the_user(server: ImageServer, make: Make) -> None:
    server.robots_answers = [(200, "User-agent: *\nDisallow: /")]
    assert results(make(respect_robots=False), server.url("good")) == [GOOD] and server.robots_requests == 0


def test_a_downloader_that_nobody_needs_ends_its_connections_and_its_thread(server: ImageServer) -> None:
    downloader = Downloader(DownloadConfig(allow_private=True))
    assert results(downloader, server.url("good")) == [GOOD]
    thread, session = downloader._thread, downloader._fetcher.session
    del downloader
    thread.join(10)
    assert not thread.is_alive() and session.closed


# --- addresses


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "[::1]", "10.0.0.1", "169.254.169.254", "[::ffff:127.0.0.1]", "0.0.0.0"],
)
def test_private_hosts_are_refused_unless_allowed(server: ImageServer, make: Make, host: str) -> None:
    assert results(make(allow_private=False), server.url("good", host)) == ["private_address"]
    assert server.requests.total() == 0


@pytest.mark.parametrize("host", ["2130706433", "127.1", "0177.0.0.1", "0x7f000001"])
def test_addresses_in_disguise_are_no_links(server: ImageServer, make: Make, host: str) -> None:
    assert results(make(allow_private=False), server.url("good", host)) == ["bad_url"]
    assert server.requests.total() == 0


def test_a_redirect_into_the_private_network_is_refused(
    server: ImageServer, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = addresses.is_public
    monkeypatch.setattr(addresses, "is_public", lambda address: address == "127.0.0.1" or real(address))
    downloader = make(allow_private=False)
    inside = ["127.0.0.2", "169.254.169.254", "[::1]", "ip6-loopback.invalid"]
    links = [server.url(f"to/?url=http://{host}:{server.port}/good") for host in inside]
    assert results(downloader, server.url("to/good"), *links) == [GOOD, *["private_address"] * 3, "dns"]
    assert server.requests["good"] == 1


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2001:4860:4860::8888", True),
        ("64:ff9b::808:808", True),
        ("2002:808:808::1", True),
        ("192.168.1.1", False),
        ("100.64.0.1", False),
        ("169.254.169.254", False),
        ("224.0.0.1", False),
        ("240.0.0.1", False),
        ("255.255.255.255", False),
        ("fd00::1", False),
        ("fe80::1%eth0", False),
        ("ff02::1", False),
        ("::", False),
        ("::ffff:10.0.0.1", False),
        ("64:ff9b::a9fe:a9fe", False),
        ("2002:7f00:1::1", False),
    ],
)
def test_public_addresses_are_known(address: str, public: bool) -> None:
    assert addresses.is_public(address) is public


# --- the whole stage


def test_links_are_curated_and_what_never_came_is_dropped_for_its_reason(server: ImageServer, tmp_path: Path) -> None:
    paths = ["good", "status/404", "html", "good", "robots/plain"]
    columns = {"URL": [server.url(path) for path in paths], "TEXT": ["one", "two", "three", "four", "five"]}
    pq.write_table(pa.table({**columns, "pwatermark": [0.1, 0.1, 0.1, 0.99, 0.1]}), tmp_path / "laion.parquet")
    given = {"input": str(tmp_path / "laion.parquet"), "output": str(tmp_path / "out"), "local": True}
    filters = {"resolution": {"target_size": 16}, "duplicates": {}}
    download = {"allow_private": True, "backoff_s": 0.01}
    ledger = run_curate(CurateConfig.model_validate({**given, "filters": filters, "download": download}))
    reasons = {"download_http_404": 1, "download_content_type": 1, "download_opt_out": 1, "watermark": 1}
    assert ledger.to_json() == {"in": 5, "kept": 1, "dropped": dict(sorted(reasons.items())), "quarantined": {}}
    kept = find_inputs(str(tmp_path / "out")).shards
    (row,) = [row for url in kept for row in read_rows(url, "x")]
    assert row["image"] == GOOD and row["caption"] == "one" and json.loads(row["meta"])["url"] == server.url("good")
    # Politeness may change between runs, what is asked for may not.
    with pytest.raises(UserError, match="made with download"):
        strict = {**download, "max_bytes": 10}
        run_curate(CurateConfig.model_validate({**given, "filters": filters, "download": strict, "mode": "resume"}))
    slow = {**download, "per_host": 1}
    again = CurateConfig.model_validate({**given, "filters": filters, "download": slow, "mode": "resume"})
    assert run_curate(again).to_json() == ledger.to_json() and server.requests["good"] == 2


@pytest.mark.ray
def test_tars_and_links_become_rows_with_images_each_once_under_its_label(
    ray_session: None, server: ImageServer, tmp_path: Path
) -> None:
    paths = ["good", "status/404", "html", "recovers/503", "good"]
    links = {"URL": [server.url(path) for path in paths], "TEXT": ["a", "b", "c", "d", None], "WIDTH": [1] * 5}
    pq.write_table(pa.table(links), tmp_path / "laion.parquet")
    (tmp_path / "own.tar").write_bytes(tar_bytes([*sample("x", 5), *sample("y", 6)]))
    inputs = find_inputs(f"{tmp_path}/*", rows_per_shard=3)
    laion, own = (shard_label(f"{tmp_path}/{name}") for name in ("laion.parquet", "own.tar"))
    assert [inputs.shards[url] for url in inputs.links] == [f"{laion}__000000000", f"{laion}__000000003"]
    cfg = DownloadConfig(allow_private=True, backoff_s=0.01)
    sources = list(shard_sources(inputs.shards, rows_per_block=2).values())
    rows = list(run_stages(sources, [download_stage(cfg)], local=False))
    found = {(row["shard"], row["row"], row["last"]): row["image"] or row["problem"] for row in rows}
    assert len(found) == len(rows) and found == {
        (f"{laion}__000000000", 0, False): GOOD,
        (f"{laion}__000000000", 1, False): "download:http_404",
        (f"{laion}__000000000", 2, True): "download:content_type",
        (f"{laion}__000000003", 0, False): GOOD,
        (f"{laion}__000000003", 1, True): "no_caption",
        (own, 0, False): image_bytes(5),
        (own, 1, True): image_bytes(6),
    }
