// Result files with size and hash, and how to use each of them elsewhere.
import { html, useState } from "../../vendor/preact-htm.js";
import { bytes } from "../format.js";
import { Icon } from "../icons.js";
import { t } from "../i18n.js";
import { Code, CopyButton, Tabs } from "../ui.js";

const KINDS = {
  diffusers: { title: "Adapter for diffusers", about: "The usual LoRA file; load_lora_weights reads it.", order: 0 },
  kohya: { title: "Adapter for ComfyUI and A1111", about: "The same weights under kohya names.", order: 1 },
  peft: { title: "PEFT adapter folder", about: "Zip of adapter_config.json and weights, for PeftModel.", order: 2 },
  merged: { title: "Whole model, adapter merged in", about: "A plain pipeline folder; needs no LoRA support.", order: 3 },
  receipt: { title: "Receipt", about: "Each file was read back and compared; this says how.", order: 4 },
  config: { title: "Configuration", about: "Every setting of this run, to repeat it.", order: 5 },
};
const kindOf = (f) => KINDS[f.kind] ?? { title: f.name, about: "", order: 9 };

/** The file most people want: the diffusers adapter. */
export const mainFile = (files) => [...files].sort((a, b) => kindOf(a).order - kindOf(b).order)[0];
export const fileUrl = (jobId, f) => `jobs/${encodeURIComponent(jobId)}/files/${encodeURIComponent(f.name)}`;

export function Downloads({ jobId, files }) {
  const list = [...files].sort((a, b) => kindOf(a).order - kindOf(b).order || a.name.localeCompare(b.name));
  return html`<ul class="files">${list.map((f) => html`<li key=${f.name}>
    <span class="file-icon"><${Icon} name="file" /></span>
    <div class="grow stack-s"><div><strong>${t(kindOf(f).title)}</strong> <span class="small muted">${t(kindOf(f).about)}</span></div>
      <div class="row small"><code class="clip">${f.name}</code><span class="muted num nowrap">${bytes(f.bytes)}</span></div>
      <div class="row sha"><span class="hash clip" title=${f.sha256} data-sha256=${f.sha256}>sha256 ${f.sha256}</span><${CopyButton} text=${f.sha256} label=${t("Copy the hash of {name}", { name: f.name })} /></div></div>
    <a class=${`btn ${kindOf(f).order === 0 ? "primary" : ""}`} href=${fileUrl(jobId, f)} download=${f.name} data-kind=${f.kind}><${Icon} name="download" />${t("Download")}<span class="sr"> ${f.name}</span></a>
  </li>`)}</ul>`;
}

const quote = (text) => JSON.stringify(text);

function snippets({ jobId, files, base, prompt }) {
  const find = (kind) => files.find((f) => f.kind === kind);
  const url = (f) => new URL(fileUrl(jobId, f), document.baseURI).href;
  const list = [];
  const diffusers = find("diffusers");
  const kohya = find("kohya");
  const peft = find("peft");
  if (diffusers)
    list.push({
      id: "diffusers",
      label: "diffusers",
      note: t("Replace the path by the folder of the base model that was trained on."),
      code: `from diffusers import StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained("path/to/${base}")
pipe.load_lora_weights(".", weight_name=${quote(diffusers.name)})
image = pipe(${quote(prompt)}, num_inference_steps=25).images[0]
image.save("out.png")`,
    });
  if (kohya)
    list.push({
      id: "comfyui",
      label: "ComfyUI / A1111",
      note: t("In ComfyUI add the node LoraLoader; in A1111 write <lora:{stem}:1> into the prompt.", { stem: kohya.name.replace(/\.safetensors$/, "") }),
      code: `# ComfyUI
curl -o ComfyUI/models/loras/${kohya.name} ${url(kohya)}
# A1111
curl -o models/Lora/${kohya.name} ${url(kohya)}`,
    });
  if (peft)
    list.push({
      id: "peft",
      label: "PEFT",
      note: t("Unpack the zip first."),
      code: `from diffusers import UNet2DConditionModel
from peft import PeftModel

unet = UNet2DConditionModel.from_pretrained("path/to/${base}", subfolder="unet")
unet = PeftModel.from_pretrained(unet, ${quote(peft.name.replace(/\.zip$/, ""))})`,
    });
  if (diffusers)
    list.push({
      id: "curl",
      label: "curl",
      note: t("Resumes a broken download and checks the hash."),
      code: `curl -C - -o ${diffusers.name} ${url(diffusers)}
echo "${diffusers.sha256}  ${diffusers.name}" | sha256sum -c`,
    });
  return list;
}

export function HowToUse(props) {
  const list = snippets(props);
  const [id, setId] = useState(list[0]?.id);
  const chosen = list.find((s) => s.id === id) ?? list[0];
  if (!chosen) return null;
  return html`<div class="stack-s"><div class="row"><h3>${t("How to use it")}</h3><${Tabs} tabs=${list} value=${chosen.id} onChange=${setId} label=${t("Program")} /></div>
    <${Code} text=${chosen.code} label=${chosen.label} /><p class="note">${chosen.note}</p></div>`;
}
