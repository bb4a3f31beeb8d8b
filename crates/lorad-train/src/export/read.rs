//! Adapter files to start from: the three dialects, also as other tools write them.

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    io::{Cursor, Read},
    path::Path,
};

use candle_core::{DType, Device, Tensor, Var};
use lorad_proto::problem::Problem;
use safetensors::SafeTensors;
use serde_json::Value;
use zip::ZipArchive;

use super::formats::kohya_name;
use crate::{
    Result, TrainError,
    lora::{Adapter, AdapterPart, AdapterSet, target},
    nn::{AdaptableModule, ModuleKind},
};

/// The files of a PEFT folder or archive.
const PEFT_WEIGHTS: &str = "adapter_model.safetensors";
const PEFT_CONFIG: &str = "adapter_config.json";
/// Tensors that one message names.
const NAMED: usize = 3;

/// Reads an adapter for `modules` of the model `root` (`unet`): a diffusers or kohya file, or a PEFT folder, its weights, or an
/// archive of it. Ranks, alphas and magnitudes are the file's; rows of zeros that only fill up a rank are left out.
///
/// # Errors
/// `init_adapter.unreadable`, or `init_adapter.no_fit` with the names of tensors that the model has no place for.
pub fn read_adapter(path: &Path, root: &str, modules: &[AdaptableModule]) -> Result<AdapterSet> {
    let file = File::open(path)?;
    let mut places: HashMap<String, &AdaptableModule> = HashMap::new();
    for module in modules {
        let full = format!("{root}.{}", module.path);
        places.insert(kohya_name(&full), module);
        places.insert(full, module);
        places.insert(format!("base_model.model.{}", module.path), module);
    }
    let mut found: BTreeMap<&str, Parts<'_>> = BTreeMap::new();
    let mut faults = Vec::new();
    for (key, tensor) in &file.tensors {
        let Some((name, part)) = part_of(key) else {
            faults.push(format!("{key} is no tensor of a LoRA"));
            continue;
        };
        let Some(module) = places.get(name) else {
            faults.push(format!("the base model has no module for {key}"));
            continue;
        };
        let parts = found
            .entry(&module.path)
            .or_insert_with(|| Parts::new(name, module.kind));
        match part {
            Part::Alpha => parts.alpha = Some(tensor),
            Part::Of(part) => {
                parts.tensors.insert(part, (key, tensor));
            }
        }
    }
    let mut set = AdapterSet::default();
    for (module, parts) in &found {
        match parts.adapter(&file) {
            Ok(adapter) => {
                set.modules.insert(format!("{root}.{module}"), adapter);
            }
            Err(fault) => faults.push(fault),
        }
    }
    if faults.is_empty() && !set.modules.is_empty() {
        return Ok(set);
    }
    faults.sort();
    let more = faults.len().saturating_sub(NAMED);
    faults.truncate(NAMED);
    let more = if more > 0 {
        format!("; and {more} more")
    } else {
        String::new()
    };
    let detail = if faults.is_empty() {
        "it holds no adapter".to_owned()
    } else {
        faults.join("; ")
    };
    Err(Problem::new(
        "init_adapter.no_fit",
        "The adapter to start from does not fit",
        format!("{}: {detail}{more}.", path.display()),
    )
    .with_hint("Use an adapter of this base model's line that holds LoRA or DoRA of the UNet alone: the diffusers or kohya file, or the PEFT archive, of a job.")
    .into())
}

enum Part {
    Alpha,
    Of(AdapterPart),
}

/// A key's module and what it holds.
fn part_of(key: &str) -> Option<(&str, Part)> {
    use AdapterPart::{A, B, Magnitude};
    [
        (".lora_A.weight", Part::Of(A)),
        (".lora_down.weight", Part::Of(A)),
        (".lora.down.weight", Part::Of(A)),
        (".lora_B.weight", Part::Of(B)),
        (".lora_up.weight", Part::Of(B)),
        (".lora.up.weight", Part::Of(B)),
        (".lora_magnitude_vector", Part::Of(Magnitude)),
        (".alpha", Part::Alpha),
    ]
    .into_iter()
    .find_map(|(ending, part)| Some((key.strip_suffix(ending)?, part)))
}

/// One module's tensors as the file has them.
struct Parts<'a> {
    /// As the file calls it.
    name: &'a str,
    kind: ModuleKind,
    tensors: BTreeMap<AdapterPart, (&'a str, &'a Tensor)>,
    alpha: Option<&'a Tensor>,
}

impl<'a> Parts<'a> {
    fn new(name: &'a str, kind: ModuleKind) -> Self {
        Self {
            name,
            kind,
            tensors: BTreeMap::new(),
            alpha: None,
        }
    }

    /// # Errors
    /// One sentence.
    fn adapter(&self, file: &File) -> std::result::Result<Adapter, String> {
        let get = |part: AdapterPart| self.tensors.get(&part).copied();
        let (Some((a_key, a)), Some((b_key, b))) = (get(AdapterPart::A), get(AdapterPart::B)) else {
            return Err(format!("{} has only one of its two factors", self.name));
        };
        let rank = a.dims().first().copied().unwrap_or(0);
        let fitted = |part: AdapterPart, key: &str, tensor: &Tensor| {
            let expected = self.kind.shape_of(part, rank);
            // A 1x1 convolution's factor may be written as a matrix, and the other way round.
            let plain = |dims: &[usize]| dims.iter().copied().filter(|d| *d != 1).collect::<Vec<_>>();
            if rank == 0 || plain(tensor.dims()) != plain(&expected) {
                return Err(format!("{key} has shape {:?}, expected {expected:?}", tensor.dims()));
            }
            tensor.reshape(expected).map_err(|e| format!("{key}: {e}"))
        };
        let (a, b) = (fitted(AdapterPart::A, a_key, a)?, fitted(AdapterPart::B, b_key, b)?);
        let magnitude = get(AdapterPart::Magnitude).map(|(key, m)| fitted(AdapterPart::Magnitude, key, m));
        let magnitude = magnitude.transpose()?;
        let scale = match self.alpha {
            Some(alpha) => scalar(alpha).ok_or_else(|| format!("{}.alpha is no number", self.name))? / rank as f64,
            None => file.scale(self.name, rank)?,
        };
        build(&a, &b, magnitude.as_ref(), scale).map_err(|e| format!("{}: {e}", self.name))
    }
}

fn scalar(t: &Tensor) -> Option<f64> {
    let values = t.flatten_all().ok()?.to_vec1::<f32>().ok()?;
    values.first().map(|v| f64::from(*v)).filter(|v| v.is_finite())
}

/// Leaves out what only fills up the rank: last rows of A and columns of B that are both zero.
fn build(a: &Tensor, b: &Tensor, magnitude: Option<&Tensor>, scale: f64) -> candle_core::Result<Adapter> {
    let size = |t: Tensor| t.abs()?.sum(1)?.to_vec1::<f32>();
    let rows = size(a.flatten_from(1)?)?;
    let columns = size(b.flatten_from(1)?.t()?.contiguous()?)?;
    let used = rows.iter().zip(&columns).rposition(|(row, column)| row + column > 0.0);
    let rank = used.map_or(1, |last| last + 1);
    let var = |t: &Tensor| Var::from_tensor(&t.contiguous()?);
    Ok(Adapter {
        magnitude: magnitude.map(var).transpose()?,
        ..Adapter::new(
            var(&a.narrow(0, 0, rank)?)?,
            var(&b.narrow(1, 0, rank)?)?,
            scale * rank as f64,
        )
    })
}

/// What lies on the disk.
struct File {
    /// In f32.
    tensors: HashMap<String, Tensor>,
    /// `adapter_config.json`, or the same from a diffusers file's header (`unet.r`, …).
    config: Option<Value>,
}

impl File {
    fn open(path: &Path) -> Result<Self> {
        let unreadable = |what: &str| {
            Problem::new(
                "init_adapter.unreadable",
                "The adapter to start from cannot be read",
                format!("{}: {what}", path.display()),
            )
            .with_hint("Give a .safetensors file of an adapter, or a PEFT folder or archive.")
        };
        let read = |path: &Path| fs::read(path).map_err(TrainError::io("read", path));
        let is = |extension: &str| path.extension().is_some_and(|e| e.eq_ignore_ascii_case(extension));
        let (weights, config) = if path.is_dir() {
            (read(&path.join(PEFT_WEIGHTS))?, fs::read(path.join(PEFT_CONFIG)).ok())
        } else if is("zip") {
            let mut zip = ZipArchive::new(Cursor::new(read(path)?)).map_err(|e| unreadable(&e.to_string()))?;
            let mut entry = |name: &str| -> Result<Vec<u8>, Problem> {
                let mut bytes = Vec::new();
                let mut entry = zip.by_name(name).map_err(|e| unreadable(&format!("{name}: {e}")))?;
                entry
                    .read_to_end(&mut bytes)
                    .map_err(|e| unreadable(&format!("{name}: {e}")))?;
                Ok(bytes)
            };
            (entry(PEFT_WEIGHTS)?, Some(entry(PEFT_CONFIG)?))
        } else {
            (read(path)?, fs::read(path.with_file_name(PEFT_CONFIG)).ok())
        };
        let (_, header) = SafeTensors::read_metadata(&weights).map_err(|e| unreadable(&e.to_string()))?;
        let mut tensors = HashMap::new();
        for (key, tensor) in candle_core::safetensors::load_buffer(&weights, &Device::Cpu)? {
            let tensor = tensor.to_dtype(DType::F32)?;
            let finite = tensor
                .abs()?
                .flatten_all()?
                .to_vec1::<f32>()?
                .iter()
                .all(|v| v.is_finite());
            if !finite {
                return Err(unreadable(&format!("{key} holds values that are not numbers")).into());
            }
            tensors.insert(key, tensor);
        }
        let is_peft = tensors.keys().any(|key| key.starts_with("base_model."));
        let in_header = || header.metadata().as_ref()?.get("lora_adapter_metadata").cloned();
        let text = if is_peft {
            config
        } else {
            in_header().map(String::into_bytes)
        };
        if is_peft && text.is_none() {
            return Err(unreadable(&format!("{PEFT_CONFIG} is missing beside it, and with it the alpha")).into());
        }
        let config = text.map(|text| serde_json::from_slice(&text)).transpose();
        Ok(Self {
            tensors,
            config: config.map_err(|e| unreadable(&format!("its configuration is not valid: {e}")))?,
        })
    }

    /// `alpha / rank` of a module without an alpha of its own.
    ///
    /// # Source
    /// peft 0.21.2 `tuners/lora/layer.py` (`update_layer`); diffusers takes alpha = rank where nothing is said.
    fn scale(&self, name: &str, rank: usize) -> std::result::Result<f64, String> {
        let Some(config) = &self.config else { return Ok(1.0) };
        let module = name.trim_start_matches("base_model.model.");
        let (root, module) = match module.split_once('.') {
            Some((root, rest)) if config.get(format!("{root}.r")).is_some() => (format!("{root}."), rest),
            _ => (String::new(), module),
        };
        let field = |name: &str| &config[format!("{root}{name}")];
        let special = field("alpha_pattern").as_object().and_then(|patterns| {
            let fits = |text: &str| target::pattern(text).is_ok_and(|pattern| pattern.is_match(module));
            patterns.iter().find(|(text, _)| fits(text)).map(|(_, alpha)| alpha)
        });
        let alpha = special.unwrap_or_else(|| field("lora_alpha")).as_f64();
        let alpha = alpha.ok_or_else(|| format!("its configuration gives no lora_alpha for {name}"))?;
        let rank = rank as f64;
        let rslora = field("use_rslora") == &Value::Bool(true);
        Ok(alpha / if rslora { rank.sqrt() } else { rank })
    }
}
