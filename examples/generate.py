"""Generate images in Python: `python examples/generate.py MODEL "a red circle" "a blue cross"`; writes out-0.png, ..."""

import sys

from instella_ray import InstellaPipeline

model, *prompts = sys.argv[1:]
pipe = InstellaPipeline.from_pretrained(model)
output = pipe(prompts, num_inference_steps=20, guidance_scale=1.0, temperature=0.3, seed=7)
for number, image in enumerate(output.images):
    image.save(f"out-{number}.png")
    print(f"out-{number}.png: '{prompts[number]}', seed {output.seeds[number]}")
