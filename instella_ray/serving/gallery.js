// Images of the page: their cards, with what can be done with each, and decoding of codes. Part of playground.html.

/** Card of the gallery. request: the request that generates this image alone. */
class GeneratedImage {
  step = 0;
  steps = 0;
  made = false;
  drawn = {}; // files in base64, by size

  constructor(request) {
    this.request = request;
    this.card = $('#card').content.cloneNode(true).firstElementChild;
    this.image = $('img', this.card);
    this.image.onload = () => this.image.classList.toggle('small', this.image.naturalWidth < 300);
    this.sizes = $('select', this.card);
    this.sizes.onchange = () => attempt(() => this.redraw(this.sizes.value));
    this.card.onclick = ({ target }) => {
      const action = target.closest('[data-do]')?.dataset.do;
      if (action) attempt(() => this[action]());
    };
    $('.prompt', this.card).textContent = this.image.alt = request.prompt || '(empty prompt)';
    this.describe();
    $('#empty').hidden = true;
  }

  get name() {
    const words = this.request.prompt.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, '-').replace(/^-|-$/g, '');
    return [words.slice(0, 40) || 'image', this.request.seed].filter((part) => part !== undefined).join('-');
  }

  describe() {
    const { size = '', seed, num_inference_steps: steps, guidance_scale, temperature, sampler, model } = this.request;
    $('.image', this.card).style.aspectRatio = size.replace('x', ' / ') || '1';
    const named = Object.entries({ seed, steps, guidance: guidance_scale, temperature });
    const facts = named.filter(([, fact]) => fact !== undefined).map(([name, fact]) => `${name} ${fact}`);
    const time = this.seconds && `${this.seconds.toFixed(1)} s`;
    const all = [size.replace('x', ' × '), ...facts, sampler, model, time];
    $('.facts', this.card).textContent = all.filter(Boolean).join(' · ');
  }

  advance(step, steps) {
    Object.assign(this, { step: Math.max(step, this.step), steps }); // a preview may arrive after later steps
    this.card.style.setProperty('--done', `${(100 * this.step) / steps}%`);
  }

  show(file) {
    this.image.src = `data:image/png;base64,${file}`;
  }

  finish({ b64_json, codes, model }, seconds) {
    Object.assign(this, { codes, seconds, made: true, step: this.steps });
    this.request.model ??= model;
    this.drawn[this.request.size] = b64_json;
    fillSizes(this.sizes, this.request.model, this.request.size);
    this.sizes.hidden = this.sizes.options.length < 2;
    for (const button of this.card.querySelectorAll('[data-made]')) button.hidden = this.request.seed === undefined;
    $('.image', this.card).disabled = false;
    this.card.classList.remove('waiting');
    this.describe();
  }

  /** Return the bits of the image in base64; requests them again with the same seed if the response had none. */
  async bits() {
    this.codes ??= (await json(GENERATIONS, { ...this.request, response_format: 'codes' })).data[0].codes;
    return this.codes;
  }

  async redraw(size) {
    this.card.setAttribute('aria-busy', 'true');
    try {
      this.drawn[size] ??= await decode(await this.bits(), size, this.request.model);
      this.request.size = size;
      this.show(this.drawn[size]);
    } finally {
      this.card.removeAttribute('aria-busy');
      this.sizes.value = this.request.size;
      this.describe();
    }
  }

  enlarge() {
    const image = $('#viewer img');
    Object.assign(image, { src: this.image.src, alt: this.image.alt, className: this.image.className });
    $('#viewer p').textContent = `${this.image.alt} · ${$('.facts', this.card).textContent}`;
    $('#viewer').showModal();
  }

  download() {
    save(bytesOf(this.drawn[this.request.size]), `${this.name}-${this.request.size}.png`, 'image/png');
  }

  again() {
    fields.seed.value = this.request.seed;
    fields.seed_choice.value = 'keep';
    return start({ ...readForm(), n: 1 });
  }

  reuse() {
    fillForm(this.request);
    fields.prompt.focus();
  }

  curl() {
    const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;
    const key = sessionStorage.getItem('key') ? '\n  -H "Authorization: Bearer $INSTELLA_API_KEY"' : '';
    const text = `curl ${quoted(new URL(GENERATIONS, document.baseURI).href)}
  -H 'Content-Type: application/json'${key}
  --data-raw ${quoted(JSON.stringify(this.request))}`;
    $('#command textarea').value = text.replaceAll('\n', ' \\\n');
    $('#command').showModal();
  }

  async code() {
    const bytes = bytesOf(await this.bits());
    save(bytes, `${this.name}.bits`, 'application/octet-stream');
    say(`Saved ${bytes.length} bytes`);
  }

  remove() {
    this.card.remove();
    $('#empty').hidden = gallery.children.length > 0;
  }
}

const decode = async (codes, size, model) => (await json(DECODE, { codes, size, model })).data[0].b64_json;

async function open(file) {
  const bytes = new Uint8Array(await file.arrayBuffer());
  if (bytes.length > 65536) throw new Problem(`${file.name}: expected a code of about 1 KB, this has ${bytes.length} bytes.`);
  const codes = btoa(String.fromCharCode(...bytes)), { size, model } = readForm();
  const b64_json = await decode(codes, size, model);
  const image = new GeneratedImage({ prompt: file.name, size, model });
  image.show(b64_json);
  image.finish({ b64_json, codes });
  gallery.prepend(image.card);
}

const bytesOf = (base64) => Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));

function save(bytes, name, type) {
  const href = URL.createObjectURL(new Blob([bytes], { type }));
  make('a', { href, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(href), 10000);
}
