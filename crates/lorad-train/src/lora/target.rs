//! Which modules get an adapter.

use regex::Regex;
use serde_json::Value;

use crate::nn::AdaptableModule;

/// What `target_modules` says.
#[derive(Debug, Clone)]
pub enum TargetModules {
    /// The last parts of module paths, as in PEFT: `to_q` matches `….attn1.to_q`.
    Suffixes(Vec<String>),
    /// A pattern that must match the whole path.
    Pattern(Box<Regex>),
}

/// Named lists.
///
/// # Source
/// diffusers v0.42.1 `examples/text_to_image/train_text_to_image_lora.py` for `attention`.
const PRESETS: [(&str, &[&str]); 2] = [
    ("attention", &["to_q", "to_k", "to_v", "to_out.0"]),
    (
        "transformer",
        &[
            "to_q",
            "to_k",
            "to_v",
            "to_out.0",
            "ff.net.0.proj",
            "ff.net.2",
            "proj_in",
            "proj_out",
        ],
    ),
];

/// Endings of the convolutions that `conv_rank` adapts: those of residual blocks and between levels, not the first and last.
///
/// # Source
/// kohya-ss/sd-scripts `networks/lora.py` (`UNET_TARGET_REPLACE_MODULE_CONV2D_3X3`) and LyCORIS, less the linear layer of the
/// time embedding.
pub const CONVOLUTIONS: [&str; 5] = [
    "conv1",
    "conv2",
    "conv_shortcut",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
];

/// Whether `conv_rank`, not `target_modules`, decides about the module at `path`.
pub fn is_convolution(path: &str) -> bool {
    CONVOLUTIONS.iter().any(|suffix| ends_with(path, suffix))
}

/// A pattern of `rank_pattern` or `alpha_pattern`: it must match a whole path, or the end of one after a dot.
///
/// # Errors
/// One sentence.
///
/// # Source
/// peft 0.21.2 `utils/other.py`, `get_pattern_key`.
pub fn pattern(text: &str) -> Result<Regex, String> {
    Regex::new(&format!(r"^(?:.*\.)?(?:{text})$")).map_err(|e| format!("{text:?} is no valid pattern: {}", reason(&e)))
}

/// The last line of a pattern's error, which says what is wrong.
fn reason(error: &regex::Error) -> String {
    error.to_string().lines().last().unwrap_or_default().trim().to_owned()
}

/// Whether the last parts of `path` are `suffix`.
fn ends_with(path: &str, suffix: &str) -> bool {
    path.strip_suffix(suffix)
        .is_some_and(|head| head.is_empty() || head.ends_with('.'))
}

impl TargetModules {
    /// Reads a preset's name, a list of suffixes, or a pattern.
    ///
    /// # Errors
    /// One sentence.
    pub fn parse(value: &Value) -> Result<Self, String> {
        match value {
            Value::String(text) => match PRESETS.iter().find(|(name, _)| name == text) {
                Some((_, suffixes)) => Ok(Self::Suffixes(suffixes.iter().map(|s| (*s).to_owned()).collect())),
                None => Regex::new(&format!("^(?:{text})$"))
                    .map(|r| Self::Pattern(Box::new(r)))
                    .map_err(|e| {
                        let reason = reason(&e);
                        format!("{text:?} is neither a preset (attention, transformer) nor a valid pattern: {reason}")
                    }),
            },
            Value::Array(list) => {
                let suffixes: Option<Vec<String>> = list.iter().map(|v| v.as_str().map(str::to_owned)).collect();
                match suffixes {
                    Some(suffixes) if !suffixes.is_empty() && suffixes.iter().all(|s| !s.is_empty()) => {
                        Ok(Self::Suffixes(suffixes))
                    }
                    _ => Err("the list must hold at least one module name, and text only".to_owned()),
                }
            }
            other => Err(format!(
                "{other} is neither a preset's name, a pattern, nor a list of module names"
            )),
        }
    }

    /// The modules that match, in their order.
    ///
    /// # Errors
    /// One sentence for every suffix or pattern that matches nothing, with names that exist.
    pub fn select(&self, modules: &[AdaptableModule]) -> Result<Vec<AdaptableModule>, Vec<String>> {
        match self {
            Self::Suffixes(suffixes) => {
                let lost: Vec<String> = suffixes
                    .iter()
                    .filter(|s| !modules.iter().any(|m| ends_with(&m.path, s)))
                    .map(|s| format!("{s:?} matches no module; there are {}", names(modules)))
                    .collect();
                if lost.is_empty() {
                    Ok(modules
                        .iter()
                        .filter(|m| suffixes.iter().any(|s| ends_with(&m.path, s)))
                        .cloned()
                        .collect())
                } else {
                    Err(lost)
                }
            }
            Self::Pattern(pattern) => {
                let found: Vec<_> = modules.iter().filter(|m| pattern.is_match(&m.path)).cloned().collect();
                if found.is_empty() {
                    let example = modules.first().map_or("", |m| m.path.as_str());
                    return Err(vec![format!(
                        "the pattern matches no module; it must match a whole path such as {example:?}, and the last \
                         parts are {}",
                        names(modules)
                    )]);
                }
                Ok(found)
            }
        }
    }
}

/// The distinct endings of module paths.
fn names(modules: &[AdaptableModule]) -> String {
    let mut names: Vec<&str> = modules
        .iter()
        .map(|m| {
            let from = ["to_out.0", "ff.net.0.proj", "ff.net.2"]
                .iter()
                .find_map(|s| m.path.rfind(s));
            let from = from.or_else(|| m.path.rfind('.').map(|dot| dot + 1));
            &m.path[from.unwrap_or(0)..]
        })
        .collect();
    names.sort_unstable();
    names.dedup();
    names.join(", ")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use serde_json::json;

    use super::*;
    use crate::nn::ModuleKind;

    fn modules() -> Vec<AdaptableModule> {
        [
            "a.attn1.to_q",
            "a.attn1.to_out.0",
            "a.attn2.to_q",
            "a.ff.net.2",
            "a.proj_in",
        ]
        .iter()
        .map(|path| AdaptableModule {
            path: (*path).to_owned(),
            kind: ModuleKind::Linear {
                in_features: 1,
                out_features: 1,
            },
        })
        .collect()
    }

    fn paths(value: &Value) -> Result<Vec<String>, Vec<String>> {
        let selected = TargetModules::parse(value).unwrap().select(&modules())?;
        Ok(selected.into_iter().map(|m| m.path).collect())
    }

    #[test]
    fn lists_match_whole_last_parts_and_patterns_whole_paths() {
        assert_eq!(paths(&json!(["to_q"])).unwrap(), ["a.attn1.to_q", "a.attn2.to_q"]);
        assert_eq!(
            paths(&json!(["attn1.to_q", "net.2"])).unwrap(),
            ["a.attn1.to_q", "a.ff.net.2"]
        );
        assert_eq!(
            paths(&json!(r".*attn1\..*")).unwrap(),
            ["a.attn1.to_q", "a.attn1.to_out.0"]
        );
    }

    #[test]
    fn what_matches_nothing_is_named_beside_what_exists() {
        let errors = paths(&json!(["to_q", "o_q", "to_z"])).unwrap_err();
        assert_eq!(errors.len(), 2, "a part of a name is no match");
        assert!(errors[1].contains("to_z") && errors[1].contains("to_out.0"));
        assert!(paths(&json!("to_q")).unwrap_err()[0].contains("a.attn1.to_q"));
        assert!(TargetModules::parse(&json!("(")).unwrap_err().contains("preset"));
        assert!(TargetModules::parse(&json!([])).is_err() && TargetModules::parse(&json!(3)).is_err());
    }
}
