"""GenEval's official detector, to run in an isolated environment (see :mod:`instella_ray.evaluation.geneval_actor`).

It needs mmdet 2, mmcv-full 1 and a compatible old torch, which conflict with this project's versions. Apart from numpy and
Pillow, its packages are imported only inside the actor. This project's tests do not run it: the packages (mmcv-full has to
be compiled) and the weights are not available on a machine without a GPU and without access to their hosts.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import numpy as np
from PIL import Image

CONFIG = "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco"
COLOR_MODEL, COLOR_WEIGHTS = "ViT-L-14", "openai"
COLOR_HASH = "b8cca3fd41ae0c99"
"""First digits of the sha256 of OpenAI's ``ViT-L-14.pt``."""
TEMPLATES = ("a photo of a {{c}} {name}", "a photo of a {{c}}-colored {name}", "a photo of a {{c}} object")
BACKGROUND = "#999"
"""Fill colour outside an object's mask when its colour is classified."""
KEPT, MOST = 0.3, 16
"""Lowest confidence and largest number per class that the rules use; other detections are dropped."""
_NAMES = (
    "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign, "
    "parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, "
    "handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, "
    "skateboard, surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, "
    "sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining "
    "table, toilet, tv, laptop, computer mouse, tv remote, computer keyboard, cell phone, microwave, oven, "
    "toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear, hair drier, toothbrush"
)
CLASSES = tuple(_NAMES.split(", "))
"""COCO's 80 classes in COCO's order, in the spelling of the official prompts."""


class OfficialDetector:
    """Official detector: Mask2Former (Swin-S, COCO instances) for objects, CLIP for colours, official settings."""

    def __init__(
        self,
        weights: str,
        colors: Sequence[str],
        *,
        config: str | None = None,
        color_weights: str = COLOR_WEIGHTS,
        device: str = "cuda",
    ) -> None:
        import mmdet
        import open_clip
        from mmdet.apis import init_detector

        folder = os.path.join(os.path.dirname(mmdet.__file__), ".mim", "configs", "mask2former")
        self.device, self.colors, self.weights = device, list(colors), weights
        self.detector = init_detector(config or os.path.join(folder, f"{CONFIG}.py"), weights, device=device)
        self.clip, _, self.transform = open_clip.create_model_and_transforms(
            COLOR_MODEL, pretrained=color_weights, device=device
        )
        self.tokenizer = open_clip.get_tokenizer(COLOR_MODEL)
        self.color_weights = color_weights
        self.classifiers: dict[str, Any] = {}

    def about(self) -> dict[str, Any]:
        """Return the fields of a :class:`.geneval.DetectorInfo`."""
        packages = ("mmdet", "mmcv-full", "torch", "open-clip-torch", "clip-benchmark")
        versions = {name: metadata.version(name) for name in packages}
        return {
            "name": "mask2former_swin_s",
            "implementation": f"mmdet {versions['mmdet']}",
            "weights": os.path.basename(self.weights),
            "weights_hash": _file_sha256(self.weights),
            "settings": {
                "color_classifier": f"open_clip {COLOR_MODEL} {self._color_weights()}, crop on {BACKGROUND}",
                "environment": versions,
            },
        }

    def _color_weights(self) -> str:
        """Return open_clip's tag of the colours' weights, or file and sha256, where OpenAI's file has the tag's name."""
        if not os.path.isfile(self.color_weights):
            return self.color_weights
        digest = _file_sha256(self.color_weights)
        name = f"file {os.path.basename(self.color_weights)}"
        return f"{COLOR_WEIGHTS if digest.startswith(COLOR_HASH) else name} (sha256 {digest})"

    def detect(self, image: np.ndarray, colored: Sequence[str]) -> list[dict[str, Any]]:
        """Detect objects in one image, uint8 ``[H, W, 3]``: dicts with ``label, score, box, color``.

        ``color`` is None except for the classes in ``colored``.
        """
        from mmdet.apis import inference_detector

        result = inference_detector(self.detector, np.ascontiguousarray(image[..., ::-1]))  # mmdet expects BGR
        boxes, masks = result if isinstance(result, tuple) else (result, None)
        found = []
        for index, label in enumerate(CLASSES):
            order = [i for i in np.argsort(boxes[index][:, 4])[::-1] if boxes[index][i, 4] > KEPT][:MOST]
            kept = [(boxes[index][i], None if masks is None else masks[index][i]) for i in order]
            colors = self._colors(image, kept, label) if kept and label in colored else [None] * len(kept)
            for (box, _), color in zip(kept, colors, strict=True):
                found.append({"label": label, "score": float(box[4]), "box": box[:4].tolist(), "color": color})
        return found

    def _colors(self, image: np.ndarray, objects: Sequence[tuple[Any, Any]], label: str) -> list[str]:
        import torch
        from clip_benchmark.metrics import zeroshot_classification as zeroshot

        if label not in self.classifiers:
            templates = [template.format(name=label) for template in TEMPLATES]
            self.classifiers[label] = zeroshot.zero_shot_classifier(
                self.clip, self.tokenizer, self.colors, templates, self.device
            )
        whole = Image.fromarray(image)
        crops = [(self.transform(_crop(whole, box, mask)), 0) for box, mask in objects]
        loader: Any = torch.utils.data.DataLoader(crops, batch_size=16)  # type: ignore[arg-type]  # a list works as a dataset
        with torch.no_grad():
            logits, _ = zeroshot.run_classification(self.clip, self.classifiers[label], loader, self.device)
        return [self.colors[int(i)] for i in logits.argmax(1)]


def _file_sha256(path: str) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _crop(image: Image.Image, box: np.ndarray, mask: np.ndarray | None) -> Image.Image:
    """Crop the object to its box, with everything outside its mask in grey."""
    if mask is not None:
        plain = Image.new("RGB", image.size, color=BACKGROUND)
        image = Image.composite(image, plain, Image.fromarray(mask))
    return image.crop(tuple(box[:4]))
