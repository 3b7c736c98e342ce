"""Put a trained model into the package: ``python examples/icons/bundle.py RUN_DIR/latest icons/tokenizer``.

Its EMA weights are written in bfloat16 to ``instella_ray/bundled/NAME``, and the checksums of the set anew. Encode with
the bundled tokenizer, and train generators on those codes: rounding changes the weights, and with them some bits.
"""

from __future__ import annotations

import argparse

from instella_ray.config import load_config
from instella_ray.models import bundled
from instella_ray.models.checkpoint import load_model, read_checkpoint_config, save_weights
from instella_ray.models.folders import find_model
from instella_ray.training.generator import GeneratorRunConfig

KEPT = ("text_encoder", "tokenizer_hash", "card")
"""Sections of ``config.yaml`` that a generator needs; the others tell of the machine that trained it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="model folder, such as RUN_DIR/latest")
    parser.add_argument("name", help="name in the package, such as icons/tokenizer")
    parser.add_argument(
        "--recipe",
        metavar="FILE",
        help="training recipe that says what users of a generator are told (default: the run)",
    )
    args = parser.parse_args()
    source = find_model(args.model)
    model, config = load_model(source), read_checkpoint_config(source)
    if args.recipe:
        config["card"] = load_config(GeneratorRunConfig, args.recipe).card.model_dump(mode="json")
    target = bundled.FOLDER / args.name
    target.mkdir(parents=True, exist_ok=True)
    weights = {
        name: value.bfloat16() if value.is_floating_point() else value for name, value in model.state_dict().items()
    }
    save_weights(target, model.cfg, weights, extra={name: config[name] for name in KEPT if config.get(name)})
    bundled.write_sums(bundled.FOLDER / args.name.partition("/")[0])
    size = sum(file.stat().st_size for file in target.iterdir())
    print(f"{target}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
