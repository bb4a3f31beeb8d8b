//! The hyperparameters that belong to the data and that families of pictures share: their declaration, what contradicts
//! what, and the defaults that follow from other settings.

use lorad_proto::problem::FieldError;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::{bucket::BucketConfig, caption::CaptionConfig};
use crate::schema::{Field, Group, Kind, field, positive};

use Group::Advanced;

/// Largest side that a bucket may have, pixels.
const MAX_SIDE: u64 = 8192;

/// In the order of forms and documents.
pub static FIELDS: &[Field] = &[
    field(
        "enable_bucket",
        Kind::Boolean,
        "true",
        "",
        Group::Basic,
        "Keep the pictures' aspect ratios, in buckets as kohya forms them (kohya's default is off); square pictures are trained the same either way. Off: every picture is cut to a square.",
    ),
    field(
        "min_bucket_reso",
        Kind::Integer { min: 8, max: MAX_SIDE },
        "null",
        "pixels",
        Advanced,
        "Shortest side of a bucket; half the resolution if not given (256 at 512, kohya's default).",
    ),
    field(
        "max_bucket_reso",
        Kind::Integer { min: 8, max: MAX_SIDE },
        "null",
        "pixels",
        Advanced,
        "Longest side of a bucket; twice the resolution if not given (1024 at 512, kohya's default).",
    ),
    field(
        "bucket_reso_steps",
        Kind::Integer { min: 8, max: 1024 },
        "null",
        "pixels",
        Advanced,
        "Sides of buckets are multiples of it; what the base model needs if not given (64 for Stable Diffusion, kohya's default).",
    ),
    field(
        "bucket_no_upscale",
        Kind::Boolean,
        "false",
        "",
        Advanced,
        "Only shrink pictures: a smaller one makes a bucket of its own size, cut to whole steps, and min_bucket_reso and max_bucket_reso do not apply.",
    ),
    field(
        "caption_prefix",
        TEXT,
        "null",
        "",
        Advanced,
        "Put in front of every caption, with a space.",
    ),
    field(
        "caption_suffix",
        TEXT,
        "null",
        "",
        Advanced,
        "Put behind every caption, with a space.",
    ),
    field(
        "trigger_word",
        TEXT,
        "null",
        "",
        Group::Basic,
        "A word for what is taught: stands in for [trigger] in captions, prefix and suffix, and in front of captions that do not hold it; regularisation images get none.",
    ),
    field(
        "shuffle_caption",
        Kind::Boolean,
        "false",
        "",
        Advanced,
        "Shuffle the tags of a caption anew every time it is shown; the text encoder then stays in memory and reads each micro-batch.",
    ),
    field(
        "keep_tokens",
        Kind::Integer { min: 0, max: 255 },
        "0",
        "tags",
        Advanced,
        "First tags that shuffle_caption leaves in place, prefix and trigger word counted.",
    ),
    field(
        "caption_separator",
        Kind::Text { max_chars: 16 },
        "\",\"",
        "",
        Advanced,
        "What stands between tags; shuffled ones are joined by a comma and a space, as in kohya.",
    ),
    field(
        "masked_loss",
        Kind::Boolean,
        "false",
        "",
        Advanced,
        "Count the loss where a picture's mask is white and not where it is black: its mask file, or its own transparency; pictures with neither count everywhere.",
    ),
    field(
        "prior_loss_weight",
        positive(100.0),
        "1.0",
        "",
        Advanced,
        "How much a regularisation image counts against a picture of the subject.",
    ),
];

const TEXT: Kind = Kind::Text { max_chars: 400 };

/// The resolved settings.
#[derive(Debug, Clone, Deserialize)]
pub struct DataConfig {
    /// Sizes.
    #[serde(flatten)]
    pub bucket: BucketConfig,
    /// Texts.
    #[serde(flatten)]
    pub caption: CaptionConfig,
    /// Whether masks are used.
    pub masked_loss: bool,
    /// Weight of regularisation images.
    pub prior_loss_weight: f64,
}

/// What cannot be together. `resolution`: the base's own; `multiple`: what sides must be multiples of.
pub fn contradictions(given: &Map<String, Value>, resolution: u32, multiple: u64) -> Vec<FieldError> {
    let mut errors = Vec::new();
    let number = |name: &str| given.get(name).and_then(Value::as_u64);
    let is = |name: &str, value: bool| given.get(name) == Some(&Value::Bool(value));
    let mut fault = |name: &str, code: &str, detail: String| {
        errors.push(FieldError::new(format!("/{name}"), code, detail));
    };
    for name in [
        "min_bucket_reso",
        "max_bucket_reso",
        "bucket_reso_steps",
        "bucket_no_upscale",
    ] {
        let set = given
            .get(name)
            .is_some_and(|v| !v.is_null() && v != &Value::Bool(false));
        if set && is("enable_bucket", false) {
            fault(
                name,
                "contradiction",
                format!("{name} has no effect without enable_bucket"),
            );
        } else if set && name.ends_with("bucket_reso") && is("bucket_no_upscale", true) {
            fault(
                name,
                "contradiction",
                format!("{name} does not apply with bucket_no_upscale"),
            );
        }
    }
    if !is("shuffle_caption", true) {
        if number("keep_tokens").is_some_and(|n| n > 0) {
            let detail = "keep_tokens has no effect without shuffle_caption".to_owned();
            fault("keep_tokens", "contradiction", detail);
        }
        if given
            .get("caption_separator")
            .and_then(Value::as_str)
            .is_some_and(|s| s != ",")
        {
            let detail = "caption_separator has no effect without shuffle_caption".to_owned();
            fault("caption_separator", "contradiction", detail);
        }
    }
    if let Some(steps) = number("bucket_reso_steps")
        && !steps.is_multiple_of(multiple)
    {
        let detail = format!("{steps} is not a multiple of {multiple}, which this base model needs");
        fault("bucket_reso_steps", "not_allowed", detail);
    }
    let steps = number("bucket_reso_steps")
        .filter(|steps| *steps > 0)
        .unwrap_or(multiple);
    let side = number("resolution").unwrap_or_else(|| u64::from(resolution));
    if let Some(min) = number("min_bucket_reso") {
        if min > side {
            fault(
                "min_bucket_reso",
                "contradiction",
                format!("{min} is above the resolution, {side}"),
            );
        } else if !min.is_multiple_of(steps) {
            let detail = format!("{min} is not a multiple of bucket_reso_steps, {steps}");
            fault("min_bucket_reso", "not_allowed", detail);
        }
    }
    if let Some(max) = number("max_bucket_reso") {
        if max < side {
            fault(
                "max_bucket_reso",
                "contradiction",
                format!("{max} is below the resolution, {side}"),
            );
        } else if !max.is_multiple_of(steps) {
            let detail = format!("{max} is not a multiple of bucket_reso_steps, {steps}");
            fault("max_bucket_reso", "not_allowed", detail);
        }
    }
    errors
}

/// Fills in what follows from other settings; `resolution` must be there.
pub fn fill_defaults(map: &mut Map<String, Value>, multiple: u64) {
    if map.get("enable_bucket") != Some(&Value::Bool(true)) {
        return;
    }
    let resolution = map.get("resolution").and_then(Value::as_u64).unwrap_or(512);
    let mut default = |name: &str, value: u64| {
        if map.get(name).is_none_or(Value::is_null) {
            map.insert(name.to_owned(), json!(value));
        }
    };
    let multiple = multiple.max(1);
    default("bucket_reso_steps", multiple);
    if map.get("bucket_no_upscale") == Some(&Value::Bool(true)) {
        return;
    }
    let steps = map
        .get("bucket_reso_steps")
        .and_then(Value::as_u64)
        .unwrap_or(multiple)
        .max(1);
    let mut default = |name: &str, value: u64| {
        if map.get(name).is_none_or(Value::is_null) {
            map.insert(name.to_owned(), json!(value));
        }
    };
    default("min_bucket_reso", (resolution / 2 / steps).max(1) * steps);
    default("max_bucket_reso", (resolution * 2 / steps).max(1) * steps);
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn pointers(given: &Value) -> Vec<String> {
        contradictions(given.as_object().unwrap(), 512, 64)
            .into_iter()
            .map(|e| e.pointer)
            .collect()
    }

    #[test]
    fn bucket_settings_that_mean_nothing_are_refused_together() {
        assert_eq!(
            pointers(&json!({"enable_bucket": false, "min_bucket_reso": 256, "bucket_no_upscale": true})),
            ["/min_bucket_reso", "/bucket_no_upscale"]
        );
        assert_eq!(
            pointers(&json!({"bucket_no_upscale": true, "max_bucket_reso": 1024})),
            ["/max_bucket_reso"]
        );
        assert_eq!(
            pointers(&json!({"bucket_reso_steps": 32, "min_bucket_reso": 576, "max_bucket_reso": 448})),
            ["/bucket_reso_steps", "/min_bucket_reso", "/max_bucket_reso"]
        );
        assert!(pointers(&json!({"enable_bucket": false, "bucket_no_upscale": false})).is_empty());
    }

    #[test]
    fn caption_settings_that_mean_nothing_are_refused_together() {
        assert_eq!(
            pointers(&json!({"keep_tokens": 1, "caption_separator": ";"})),
            ["/keep_tokens", "/caption_separator"]
        );
        assert!(pointers(&json!({"keep_tokens": 0, "caption_separator": ","})).is_empty());
        assert!(pointers(&json!({"shuffle_caption": true, "keep_tokens": 1, "caption_separator": ";"})).is_empty());
    }

    #[test]
    fn the_defaults_at_512_are_those_of_kohya() {
        let mut map = json!({"enable_bucket": true, "resolution": 512, "bucket_no_upscale": false});
        fill_defaults(map.as_object_mut().unwrap(), 64);
        assert_eq!(
            (
                &map["min_bucket_reso"],
                &map["max_bucket_reso"],
                &map["bucket_reso_steps"]
            ),
            (&json!(256), &json!(1024), &json!(64))
        );
    }
}
