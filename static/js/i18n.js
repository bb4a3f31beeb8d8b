// Words. The English sentence is the key; a dictionary maps it to another language. Placeholders are {named}.
// Pure: knows no page and no DOM but <html lang>.

/** @type {Record<string, string>} */
let dictionary = {};

/** Installs a dictionary: English sentence -> translation. */
export function useDictionary(lang, words) {
  dictionary = words;
  document.documentElement.lang = lang;
}

/**
 * Translates a sentence and fills in its placeholders.
 * @param {string} sentence
 * @param {Record<string, unknown>} [values]
 */
export function t(sentence, values) {
  const text = dictionary[sentence] ?? sentence;
  return values ? text.replace(/\{(\w+)\}/g, (whole, key) => (key in values ? String(values[key]) : whole)) : text;
}

/** Picks the singular or plural sentence for `n`. */
export const plural = (n, one, many, values) => t(n === 1 ? one : many, { n: n.toLocaleString("en"), ...values });
