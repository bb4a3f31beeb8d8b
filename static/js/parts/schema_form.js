// A form made from a family's JSON Schema: the same declaration that checks the request. Knows no family.
// Holds text as typed; `toRequest` turns it into the values that differ from the defaults.
import { html } from "../../vendor/preact-htm.js";
import { Icon } from "../icons.js";
import { t } from "../i18n.js";

/** The plain types a property allows, without null. */
function typesOf(property) {
  const list = [].concat(property.type ?? [], ...(property.anyOf ?? property.oneOf ?? []).map((p) => p.type ?? []));
  return [...new Set(list)].filter((x) => x !== "null");
}
/** Fixed choices, wherever the schema puts them. */
function choicesOf(property) {
  const all = [property, ...(property.anyOf ?? property.oneOf ?? [])];
  return [...new Set(all.flatMap((p) => p.enum ?? (p.const !== undefined ? [p.const] : [])))].filter((x) => x !== null);
}
const isOpen = (property) => choicesOf(property).length > 0 && (property.anyOf ?? property.oneOf ?? []).some((p) => p.type && !p.enum && p.const === undefined && p.type !== "null");

/** Properties in the order and groups of the form. */
export function properties(schema) {
  return Object.entries(schema?.properties ?? {})
    .map(([name, property], i) => ({ name, property, group: property["x-group"] ?? "advanced", order: property["x-order"] ?? 1000 + i }))
    .sort((a, b) => a.order - b.order);
}

const show = (value) => (value === undefined || value === null ? "" : typeof value === "object" ? JSON.stringify(value) : String(value));
/** The default as text. */
export const defaultText = (property) => show(property.default);

/** Text of a field -> the value to send; text that is no such value goes as it is, so that the server names the fault. */
export function parse(property, text) {
  const types = typesOf(property);
  const trimmed = text.trim();
  if (trimmed === "") return undefined;
  if (types.includes("boolean") && (trimmed === "true" || trimmed === "false")) return trimmed === "true";
  if ((types.includes("number") || types.includes("integer")) && Number.isFinite(Number(trimmed))) return Number(trimmed);
  if ((types.includes("array") || types.includes("object")) && /^[[{]/.test(trimmed)) {
    try {
      return JSON.parse(trimmed);
    } catch {
      return trimmed;
    }
  }
  // a list of plain names; anything else with a comma is a pattern
  if (types.includes("array") && /^[\w. -]+(,[\w. -]*)+$/.test(trimmed)) return trimmed.split(",").map((x) => x.trim()).filter(Boolean);
  return trimmed;
}

/** The values that differ from their defaults. @param {Record<string,string>} texts as typed */
export function toRequest(schema, texts) {
  const out = {};
  for (const { name, property } of properties(schema)) {
    const text = texts[name];
    if (text === undefined || text.trim() === defaultText(property).trim()) continue;
    const value = parse(property, text);
    if (value !== undefined) out[name] = value;
  }
  return out;
}

/** Text fields from a request's values, for a clone. */
export const toTexts = (values) => Object.fromEntries(Object.entries(values ?? {}).map(([k, v]) => [k, show(v)]));

const SPELLINGS = { lora: "LoRA", lr: "LR", l2: "L2", snr: "SNR", ema: "EMA" };
const title = (name, property) =>
  property.title ??
  name
    .split("_")
    .map((word) => SPELLINGS[word] ?? word)
    .join(" ")
    .replace(/^./, (c) => c.toUpperCase());

function bounds(property) {
  const low = property.minimum ?? property.exclusiveMinimum;
  const high = property.maximum ?? property.exclusiveMaximum;
  const above = property.exclusiveMinimum !== undefined;
  if (low !== undefined && high !== undefined && high <= 1e5) return above ? `> ${low}, ≤ ${high}` : `${low} – ${high}`;
  if (low !== undefined) return above ? `> ${low}` : `≥ ${low}`;
  return high !== undefined ? `≤ ${high}` : "";
}

/** A labelled control with its help and its error beneath. */
export function Field({ id, label, unit, help, problem, changed, onReset, children }) {
  return html`<div class="field" data-field=${id}><label for=${`f-${id}`}><span>${label}</span>${unit && html`<span class="unit">${unit}</span>`}
      ${changed && html`<button type="button" class="linklike small changed" onClick=${onReset}>${t("Reset")}</button>`}</label>
    ${children}
    ${problem && html`<p class="problem" id=${`e-${id}`}><${Icon} name="alert" /><span>${problem}</span></p>`}
    ${help && html`<p class="help" id=${`h-${id}`}>${help}</p>`}</div>`;
}

function Property({ name, property, text, problem, onText }) {
  const types = typesOf(property);
  const choices = choicesOf(property);
  const suggestions = choices.length ? choices : (property.examples ?? []).filter((x) => typeof x === "string");
  const fallback = defaultText(property);
  const value = text ?? fallback;
  const changed = text !== undefined && text.trim() !== fallback.trim();
  const unit = [property["x-unit"], bounds(property)].filter(Boolean).join(", ");
  const common = { id: `f-${name}`, "aria-invalid": problem ? "true" : undefined, "aria-describedby": `${problem ? `e-${name} ` : ""}h-${name}` };
  let control;
  if (types.length === 1 && types[0] === "boolean") {
    control = html`<label class="switch"><input type="checkbox" ...${common} checked=${value === "true"} onChange=${(e) => onText(String(e.currentTarget.checked))} />${value === "true" ? t("On") : t("Off")}</label>`;
  } else if (choices.length > 0 && !isOpen(property)) {
    control = html`<select class="input" ...${common} value=${value} onChange=${(e) => onText(e.currentTarget.value)}>
      ${fallback === "" && html`<option value="">${t("automatic")}</option>`}${choices.map((c) => html`<option value=${String(c)}>${String(c)}</option>`)}</select>`;
  } else {
    const numeric = types.some((x) => x === "number" || x === "integer") && !types.includes("string");
    control = html`<input class=${`input ${numeric ? "num" : ""}`} type="text" inputmode=${numeric ? "decimal" : undefined} autocomplete="off" spellcheck="false" ...${common} value=${value}
      placeholder=${fallback === "" ? t("automatic") : ""} list=${suggestions.length ? `l-${name}` : undefined} onInput=${(e) => onText(e.currentTarget.value)} />
      ${suggestions.length > 0 && html`<datalist id=${`l-${name}`}>${suggestions.map((c) => html`<option value=${String(c)} />`)}</datalist>`}`;
  }
  return html`<${Field} id=${name} label=${title(name, property)} unit=${unit} help=${property.description} problem=${problem} changed=${changed} onReset=${() => onText(undefined)}>${control}</${Field}>`;
}

/**
 * @param {{schema:object, texts:Record<string,string>, problems:Record<string,string>, onText:(name:string,text?:string)=>void}} props
 */
export function SchemaForm({ schema, texts, problems, onText }) {
  const all = properties(schema);
  const draw = (list) => html`<div class="grid-fields">${list.map((p) => html`<${Property} key=${p.name} name=${p.name} property=${p.property} text=${texts[p.name]} problem=${problems[p.name]} onText=${(text) => onText(p.name, text)} />`)}</div>`;
  const basic = all.filter((p) => p.group === "basic");
  const advanced = all.filter((p) => p.group !== "basic");
  const touched = advanced.filter((p) => texts[p.name] !== undefined && texts[p.name].trim() !== defaultText(p.property).trim()).length;
  const broken = advanced.some((p) => problems[p.name]);
  return html`<div class="stack">${draw(basic)}
    ${advanced.length > 0 && html`<details class="fold" open=${broken || undefined}><summary><${Icon} name="chev" />${t("Advanced")} <span class="tag">${advanced.length}</span>${touched > 0 && html`<span class="tag">${t("{n} changed", { n: touched })}</span>`}</summary><div class="fold-body">${draw(advanced)}</div></details>`}
  </div>`;
}
