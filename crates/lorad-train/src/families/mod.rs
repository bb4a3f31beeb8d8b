//! Model families. A new one is one folder and one line in [`FAMILIES`].
//!
//! Families do not import each other; what two share moves to `diffusion`, `nn` or `lora`.

use std::path::Path;

use lorad_proto::{catalog::BaseModelInfo, event::WorkerEvent, problem::Problem, spec::AttemptSpec};

use crate::task::{Family, Reporter};

pub mod sd1;

/// The registry.
pub static FAMILIES: &[&dyn Family] = &[&sd1::Sd1];

/// The family of that id.
///
/// # Errors
/// `family.unknown`, with the known ids.
pub fn by_id(id: &str) -> Result<&'static dyn Family, Problem> {
    FAMILIES.iter().copied().find(|f| f.id() == id).ok_or_else(|| {
        let known: Vec<&str> = FAMILIES.iter().map(|f| f.id()).collect();
        Problem::new(
            "family.unknown",
            "No such model family",
            format!("There is no model family `{id}`; known: {}.", known.join(", ")),
        )
    })
}

/// Runs one attempt at a job with the family that it names; see [`crate::run::run_attempt`].
pub fn run_attempt(spec: &AttemptSpec, reporter: &dyn Reporter) -> WorkerEvent {
    match by_id(&spec.family) {
        Ok(family) => crate::run::run_attempt(family, spec, reporter),
        Err(problem) => WorkerEvent::Failed { problem },
    }
}

/// Makes a base's folder in the empty folder `dir` for a checkpoint in one file, asking each family in turn.
///
/// # Errors
/// `base_model.pickle` for a Python pickle, or what the last family found wrong.
pub fn import_single_file(file: &Path, dir: &Path) -> Result<(), Problem> {
    if file.extension().is_none_or(|e| e != "safetensors") {
        return Err(Problem::new(
            "base_model.pickle",
            "The checkpoint is not a safetensors file",
            format!(
                "{} is not named .safetensors; Python pickles can run code and are never opened.",
                file.display()
            ),
        )
        .with_hint("Get the safetensors version of this model."));
    }
    let mut result = Ok(());
    for family in FAMILIES {
        result = family.import_single_file(file, dir);
        if result.is_ok() {
            break;
        }
    }
    result
}

/// What the base model in `dir` is, asking each family in turn.
///
/// # Errors
/// `base_model.missing` when there is no such folder, `base_model.unsupported` when no family knows it, or what the
/// family found wrong.
pub fn inspect_base(dir: &Path) -> Result<BaseModelInfo, Problem> {
    if !dir.is_dir() {
        return Err(Problem::new(
            "base_model.missing",
            "The base model is not there",
            format!("{} is not a folder.", dir.display()),
        )
        .with_hint("Give the folder that holds model_index.json."));
    }
    for family in FAMILIES {
        if let Some(info) = family.inspect_base(dir)? {
            return Ok(info);
        }
    }
    let known: Vec<String> = FAMILIES.iter().map(|f| f.info().name).collect();
    Err(Problem::new(
        "base_model.unsupported",
        "No model family knows this base model",
        format!(
            "{} is not a base of any supported family ({}).",
            dir.display(),
            known.join(", ")
        ),
    )
    .with_hint(
        "A diffusers folder with model_index.json, unet/, vae/, text_encoder/, tokenizer/ and scheduler/ is needed.",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_family_describes_itself_with_a_unique_id_and_an_object_schema() {
        let mut ids: Vec<&str> = FAMILIES.iter().map(|f| f.id()).collect();
        for family in FAMILIES {
            let info = family.info();
            assert_eq!(info.id, family.id());
            assert!(!info.summary.is_empty() && !info.metrics.is_empty(), "{}", info.id);
            assert_eq!(info.schema["type"], "object", "{}", info.id);
            assert_eq!(info.schema["additionalProperties"], false, "{}", info.id);
        }
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len(), FAMILIES.len());
    }
}
