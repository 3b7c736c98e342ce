'use strict';
const $ = (selector, root = document) => root.querySelector(selector);
const view = $('#view'), theme = $('#theme');
let shown = null; // the button whose images are in the larger view

function show(button) {
  shown = button;
  const images = [...button.querySelectorAll('img')].map((image) => {
    const copy = image.cloneNode();
    copy.loading = 'eager';
    copy.addEventListener('load', () => {
      const ratio = copy.naturalWidth / copy.naturalHeight;
      copy.style.setProperty('--ratio', ratio);
      copy.classList.toggle('wide', ratio > 2.5);
    });
    return copy;
  });
  $('.images', view).replaceChildren(...images);
  $('p', view).textContent = [$('figcaption', button.closest('figure')).textContent, button.title].filter(Boolean).join(' · ');
  if (!view.open) view.showModal();
}

function move(by) {
  const buttons = [...document.querySelectorAll('.zoom')].filter((button) => button.checkVisibility());
  const next = buttons[buttons.indexOf(shown) + by];
  if (next) show(next);
}

document.addEventListener('click', ({ target }) => {
  const button = target.closest('.zoom');
  if (button) show(button);
  else if (target.dataset.step) move(Number(target.dataset.step));
  else if (target === view) view.close(); // outside of the dialog's contents
});
view.addEventListener('keydown', ({ key }) => {
  if (key === 'ArrowLeft') move(-1);
  if (key === 'ArrowRight') move(1);
});

// The theme is the system's until the button chooses one.
const system = matchMedia('(prefers-color-scheme: dark)'), { style } = document.documentElement;
const isDark = () => (style.colorScheme ? style.colorScheme === 'dark' : system.matches);

function nameTheme() {
  theme.textContent = isDark() ? 'Light' : 'Dark';
}

theme.addEventListener('click', () => {
  style.colorScheme = isDark() ? 'light' : 'dark';
  nameTheme();
});
system.addEventListener('change', nameTheme);
theme.hidden = false;
nameTheme();
