"""Make an API key of an endpoint."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import yaml

from .. import logs
from ..config import ArgumentParser, validate
from ..serving.keys import ApiKey, digest, new_key


def parser(prog: str = "instella-ray api-key") -> ArgumentParser:
    parser = ArgumentParser(
        prog=prog,
        description="Make a random API key. The key is printed once, on stderr, for whoever will use it; its entry is "
        "printed on stdout, for the endpoint's api_keys_file: instella-ray api-key NAME >> keys.yaml. The entry holds the "
        "key's SHA-256, not the key.",
    )
    parser.add_argument("name", metavar="NAME", help="name of the key in audit lines and metrics")
    parser.add_argument(
        "--requests-per-minute", metavar="N", type=int, help="maximum requests for images in 60 seconds"
    )
    parser.add_argument("--concurrent-images", metavar="N", type=int, help="maximum images in progress")
    parser.add_argument("--models", metavar="MODEL", nargs="+", help="models that the key may use (default: all)")
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "instella-ray api-key") -> int:
    args = parser(prog).parse_args(argv)
    logs.begin_job("api-key")
    key = new_key()
    entry = validate(ApiKey, {**vars(args), "sha256": digest(key.encode())})
    print(yaml.safe_dump([entry.model_dump(mode="json", exclude_none=True)], sort_keys=False), end="", flush=True)
    print(f"key: {key}", file=sys.stderr)
    return 0
