/** The page's texts in the visitor's language; each language is a file. */

import english from '../languages/en.json';

export type TextKey = keyof typeof english;

const others = import.meta.glob<typeof english>(['../languages/*.json', '!../languages/en.json'], { import: 'default' });
/** By their own names, which nobody needs to load a file for. */
export const LANGUAGES: Record<string, string> = {
  en: 'English',
  de: 'Deutsch',
  es: 'Español',
  fr: 'Français',
  ja: '日本語',
  zh: '中文',
};

let texts: Record<string, string> = english;

export function text(key: TextKey, values: Record<string, string | number> = {}): string {
  return texts[key].replace(/\{(\w+)\}/g, (_, name) => String(values[name]));
}

/** The visitor's choice, or the first of the browser's languages that there is. */
export function preferredLanguage(): string {
  const wanted = [localStorage.getItem('language') ?? '', ...navigator.languages].map((name) => name.slice(0, 2));
  return wanted.find((name) => name in LANGUAGES) ?? 'en';
}

/** Puts a language's texts into the page. */
export async function setLanguage(language: string): Promise<void> {
  texts = language === 'en' ? english : { ...english, ...(await others[`../languages/${language}.json`]()) };
  document.documentElement.lang = language;
  document.title = text('title');
  for (const element of document.querySelectorAll<HTMLElement>('[data-text]'))
    element.textContent = text(element.dataset.text as TextKey);
  for (const element of document.querySelectorAll<HTMLElement>('[data-name]'))
    element.setAttribute('aria-label', text(element.dataset.name as TextKey));
  for (const element of document.querySelectorAll<HTMLInputElement>('[data-hint]'))
    element.placeholder = text(element.dataset.hint as TextKey);
}
