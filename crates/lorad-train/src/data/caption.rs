//! What the text encoder reads of a caption: kohya's prefix, suffix and shuffled tags, and a trigger word.
//!
//! The template is fixed for a run; the shuffle is drawn anew for every sample from its own random stream, so it depends
//! neither on the batch layout nor on where a run was interrupted.

use serde::Deserialize;

use crate::rng::Stream;

/// Where a trigger word goes.
const PLACEHOLDER: &str = "[trigger]";

/// The caption settings, resolved.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub struct CaptionConfig {
    /// Put in front, with a space.
    pub caption_prefix: Option<String>,
    /// Put behind, with a space.
    pub caption_suffix: Option<String>,
    /// In place of `[trigger]`, or in front.
    pub trigger_word: Option<String>,
    /// Whether the tags are shuffled.
    pub shuffle_caption: bool,
    /// First tags that stay where they are.
    pub keep_tokens: usize,
    /// Between tags.
    pub caption_separator: String,
}

impl CaptionConfig {
    /// The caption with prefix, suffix and trigger word. Regularisation images show the class, not the subject: they get
    /// no trigger word.
    ///
    /// # Source
    /// kohya sd-scripts 48d368f `library/train_util.py`, `process_caption`; for the trigger word ai-toolkit
    /// `toolkit/prompt_utils.py`, `inject_trigger_into_prompt`.
    pub fn template(&self, caption: &str, is_reg: bool) -> String {
        let mut text = caption.to_owned();
        if let Some(prefix) = &self.caption_prefix {
            text = format!("{prefix} {text}");
        }
        if let Some(suffix) = &self.caption_suffix {
            text = format!("{text} {suffix}");
        }
        match &self.trigger_word {
            Some(trigger) if !is_reg => {
                text = text.replace(PLACEHOLDER, trigger);
                if text.contains(trigger.as_str()) {
                    text
                } else {
                    format!("{trigger} {text}")
                }
            }
            _ => text,
        }
    }

    /// The caption of one sample: tags shuffled but for the first ones, joined by a comma and a space whatever the
    /// separator was.
    ///
    /// # Source
    /// As [`Self::template`].
    pub fn shuffled(&self, template: &str, stream: &mut Stream) -> String {
        let tags: Vec<&str> = template
            .trim()
            .split(self.caption_separator.as_str())
            .map(str::trim)
            .collect();
        let (kept, loose) = tags.split_at(self.keep_tokens.min(tags.len()));
        let order = stream.permutation(loose.len());
        let shuffled = order.into_iter().map(|i| loose[i]);
        kept.iter().copied().chain(shuffled).collect::<Vec<_>>().join(", ")
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::rng::Purpose;

    fn config(keep_tokens: usize, separator: &str) -> CaptionConfig {
        CaptionConfig {
            shuffle_caption: true,
            keep_tokens,
            caption_separator: separator.to_owned(),
            ..CaptionConfig::default()
        }
    }

    #[test]
    fn the_template_adds_prefix_suffix_and_trigger_word() {
        let template = CaptionConfig {
            caption_prefix: Some("photo of [trigger],".to_owned()),
            caption_suffix: Some("8k".to_owned()),
            trigger_word: Some("ohwx".to_owned()),
            ..CaptionConfig::default()
        };
        assert_eq!(template.template("a red bag", false), "photo of ohwx, a red bag 8k");
        assert_eq!(template.template("a red bag", true), "photo of [trigger], a red bag 8k");
        let trigger = CaptionConfig {
            trigger_word: Some("ohwx".to_owned()),
            ..CaptionConfig::default()
        };
        assert_eq!(trigger.template("a red bag", false), "ohwx a red bag");
        assert_eq!(trigger.template("an ohwx bag", false), "an ohwx bag");
        assert_eq!(CaptionConfig::default().template(" as it is ", false), " as it is ");
    }

    proptest! {
        #[test]
        fn a_shuffle_keeps_the_first_tags_and_loses_none(n in 1_usize..12, keep in 0_usize..6, counter: u64) {
            let tags: Vec<String> = (0..n).map(|i| format!("tag {i}")).collect();
            let draw = |separator: &str| {
                let mut stream = Stream::new(5, Purpose::CaptionShuffle, counter);
                config(keep, separator).shuffled(&tags.join(separator), &mut stream)
            };
            let text = draw(",");
            prop_assert_eq!(&text, &draw(" | "));
            let mut drawn: Vec<&str> = text.split(", ").collect();
            prop_assert_eq!(&drawn[..keep.min(n)], &tags[..keep.min(n)]);
            drawn.sort_unstable();
            let mut all: Vec<&str> = tags.iter().map(String::as_str).collect();
            all.sort_unstable();
            prop_assert_eq!(drawn, all);
        }
    }

    #[test]
    fn samples_differ() {
        let draw = |counter| {
            let mut stream = Stream::new(5, Purpose::CaptionShuffle, counter);
            config(1, ",").shuffled("a, b, c, d, e, f", &mut stream)
        };
        let drawn: std::collections::BTreeSet<String> = (0..20).map(draw).collect();
        assert!(drawn.len() > 15, "{drawn:?}");
    }
}
