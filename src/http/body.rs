//! Reading request bodies: JSON whose faults are found all at once, each under its pointer; and uploads into staging.

use std::{path::Path, time::Duration};

use axum::{
    body::{Body, Bytes},
    extract::multipart::{Field, MultipartError},
    http::{HeaderMap, header},
};
use futures_util::StreamExt as _;
use lorad_faults::Point;
use lorad_proto::problem::FieldError;
use serde_json::{Map, Value};
use sha2::{Digest as _, Sha256};
use tempfile::NamedTempFile;

use super::error::{ApiError, ApiResult, Code};
use crate::app::App;

/// Largest JSON body.
pub(super) const MAX_JSON_BYTES: usize = 1 << 20;
/// Longest pause within a body.
const BODY_PAUSE: Duration = Duration::from_secs(30);

/// The media type of a request, without parameters.
pub(super) fn media_type(headers: &HeaderMap) -> String {
    let value = headers
        .get(header::CONTENT_TYPE)
        .and_then(|v| v.to_str().ok())
        .unwrap_or("");
    value.split(';').next().unwrap_or("").trim().to_ascii_lowercase()
}

/// Refuses bodies that are not declared as JSON: a form of another site can only declare other types.
pub(super) fn require_json(headers: &HeaderMap) -> ApiResult<()> {
    let found = media_type(headers);
    if found == "application/json" || (found.starts_with("application/") && found.ends_with("+json")) {
        return Ok(());
    }
    let found = if found.is_empty() { "none".to_owned() } else { found };
    Err(ApiError::new(Code::NotJson, format!("The content type is {found}.")))
}

/// Reads a whole small body.
pub(super) async fn read_all(body: Body, limit: usize) -> ApiResult<Bytes> {
    let mut stream = body.into_data_stream();
    let mut bytes = Vec::new();
    loop {
        let next = tokio::time::timeout(BODY_PAUSE, stream.next()).await;
        match next.map_err(|_| ApiError::new(Code::Timeout, "The body stopped coming."))? {
            None => return Ok(bytes.into()),
            Some(Ok(chunk)) if bytes.len() + chunk.len() <= limit => bytes.extend_from_slice(&chunk),
            Some(Ok(_)) => {
                return Err(ApiError::new(
                    Code::BodyTooLarge,
                    format!("At most {limit} bytes of JSON are read."),
                ));
            }
            Some(Err(_)) => return Err(ApiError::new(Code::MalformedJson, "The body broke off.")),
        }
    }
}

/// Parses JSON.
pub(super) fn parse(bytes: &[u8]) -> ApiResult<Value> {
    serde_json::from_slice(bytes).map_err(|e| {
        // serde_json's own words name the fault and its line and column, and nothing of the server.
        ApiError::new(Code::MalformedJson, format!("{e}."))
    })
}

/// Reads and parses a JSON body.
pub(super) async fn json(headers: &HeaderMap, body: Body) -> ApiResult<Value> {
    require_json(headers)?;
    parse(&read_all(body, MAX_JSON_BYTES).await?)
}

/// Reads a JSON body that may be missing altogether, as `{}`.
pub(super) async fn json_or_empty(headers: &HeaderMap, body: Body) -> ApiResult<Value> {
    let bytes = read_all(body, MAX_JSON_BYTES).await?;
    if bytes.is_empty() {
        return Ok(Value::Object(Map::new()));
    }
    require_json(headers)?;
    parse(&bytes)
}

/// Takes fields out of a JSON object one by one; what is wrong is collected, and what is left over is unknown.
#[derive(Debug)]
pub(super) struct Fields<'a> {
    object: Map<String, Value>,
    at: String,
    errors: &'a mut Vec<FieldError>,
    known: Vec<&'static str>,
}

impl<'a> Fields<'a> {
    /// The fields of `value`, which lies at pointer `at`. Anything but an object is an error and counts as empty.
    pub(super) fn of(value: Value, at: &str, errors: &'a mut Vec<FieldError>) -> Self {
        let object = match value {
            Value::Object(object) => object,
            other => {
                errors.push(FieldError::new(
                    at,
                    "wrong_type",
                    format!("expected an object, found {}", kind_of(&other)),
                ));
                Map::new()
            }
        };
        Self {
            object,
            at: at.to_owned(),
            errors,
            known: Vec::new(),
        }
    }

    /// Takes a field; `null` counts as missing.
    pub(super) fn take(&mut self, name: &'static str) -> Option<Value> {
        self.known.push(name);
        self.object.remove(name).filter(|v| !v.is_null())
    }

    /// Notes a fault of a field.
    pub(super) fn fault(&mut self, name: &str, code: &str, detail: impl Into<String>) {
        self.errors
            .push(FieldError::new(format!("{}/{name}", self.at), code, detail));
    }

    fn wrong_type(&mut self, name: &str, expected: &str, found: &Value) {
        self.fault(
            name,
            "wrong_type",
            format!("expected {expected}, found {}", kind_of(found)),
        );
    }

    /// A text.
    pub(super) fn string(&mut self, name: &'static str) -> Option<String> {
        match self.take(name)? {
            Value::String(text) => Some(text),
            other => {
                self.wrong_type(name, "a string", &other);
                None
            }
        }
    }

    /// A text that must be there.
    pub(super) fn required_string(&mut self, name: &'static str) -> Option<String> {
        if self.object.get(name).is_none_or(Value::is_null) {
            self.known.push(name);
            self.object.remove(name);
            self.fault(name, "required", format!("`{name}` is required"));
            return None;
        }
        self.string(name)
    }

    /// A text of 1 to `max` characters without control characters; whitespace around it is dropped.
    pub(super) fn label(&mut self, name: &'static str, max: usize) -> Option<String> {
        let text = self.string(name)?.trim().to_owned();
        self.check_label(name, &text, max).then_some(text)
    }

    /// Whether `text` is a label; if not, the fault is noted.
    pub(super) fn check_label(&mut self, name: &str, text: &str, max: usize) -> bool {
        let n = text.chars().count();
        if n == 0 || n > max {
            self.fault(
                name,
                "out_of_range",
                format!("must have 1 to {max} characters, has {n}"),
            );
            return false;
        }
        if let Some(c) = text.chars().find(|c| c.is_control()) {
            let detail = format!("holds the control character {}", c.escape_default());
            self.fault(name, "invalid_characters", detail);
            return false;
        }
        true
    }

    /// A whole number within `range`.
    pub(super) fn integer(&mut self, name: &'static str, range: std::ops::RangeInclusive<i64>) -> Option<i64> {
        let value = self.take(name)?;
        let (min, max) = (*range.start(), *range.end());
        let Value::Number(number) = &value else {
            self.wrong_type(name, "a whole number", &value);
            return None;
        };
        let whole = number.as_i64().or_else(|| {
            let f = number.as_f64()?;
            #[expect(clippy::cast_possible_truncation, reason = "checked to be whole and small")]
            (f.fract() == 0.0 && f.abs() < 9.0e15).then_some(f as i64)
        });
        match whole {
            Some(n) if range.contains(&n) => Some(n),
            Some(n) => {
                self.fault(name, "out_of_range", format!("must be {min} to {max}, is {n}"));
                None
            }
            None if number.is_f64() && number.as_f64().is_some_and(|f| f.fract() != 0.0) => {
                self.fault(name, "wrong_type", format!("expected a whole number, found {number}"));
                None
            }
            None => {
                self.fault(name, "out_of_range", format!("must be {min} to {max}, is {number}"));
                None
            }
        }
    }

    /// A number within `range`.
    pub(super) fn number(&mut self, name: &'static str, range: std::ops::RangeInclusive<f64>) -> Option<f64> {
        let value = self.take(name)?;
        match value.as_f64() {
            Some(f) if range.contains(&f) => Some(f),
            Some(f) => {
                self.fault(
                    name,
                    "out_of_range",
                    format!("must be {} to {}, is {f}", range.start(), range.end()),
                );
                None
            }
            None => {
                self.wrong_type(name, "a number", &value);
                None
            }
        }
    }

    /// `true` or `false`.
    pub(super) fn boolean(&mut self, name: &'static str) -> Option<bool> {
        match self.take(name)? {
            Value::Bool(b) => Some(b),
            other => {
                self.wrong_type(name, "true or false", &other);
                None
            }
        }
    }

    /// A list of at most `max_items` labels of at most `max_chars` characters each.
    pub(super) fn labels(&mut self, name: &'static str, max_items: usize, max_chars: usize) -> Option<Vec<String>> {
        let list = match self.take(name)? {
            Value::Array(list) => list,
            other => {
                self.wrong_type(name, "a list of strings", &other);
                return None;
            }
        };
        if list.len() > max_items {
            self.fault(
                name,
                "out_of_range",
                format!("holds {} entries; {max_items} are allowed", list.len()),
            );
            return None;
        }
        let mut texts = Vec::new();
        for (i, item) in list.into_iter().enumerate() {
            let at = format!("{name}/{i}");
            match item {
                Value::String(text) => {
                    if self.check_label(&at, &text, max_chars) {
                        texts.push(text);
                    }
                }
                other => self.wrong_type(&at, "a string", &other),
            }
        }
        Some(texts)
    }

    /// An object, for a nested [`Fields`] or as it is.
    pub(super) fn object(&mut self, name: &'static str) -> Option<Map<String, Value>> {
        match self.take(name)? {
            Value::Object(object) => Some(object),
            other => {
                self.wrong_type(name, "an object", &other);
                None
            }
        }
    }

    /// Ends the reading: every field left over is unknown.
    pub(super) fn finish(self) {
        for name in self.object.keys() {
            let token = name.replace('~', "~0").replace('/', "~1");
            let detail = format!("there is no field `{name}` here; known are {}", self.known.join(", "));
            self.errors
                .push(FieldError::new(format!("{}/{token}", self.at), "unknown_field", detail));
        }
    }
}

fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// Refuses an upload that is too large, or that the disk has no room for, before any of it is read. A client that does not say how much it
/// sends is refused only when there is hardly any room for anything.
pub(super) fn require_space(app: &App, headers: &HeaderMap) -> ApiResult<()> {
    let announced = headers
        .get(header::CONTENT_LENGTH)
        .and_then(|v| v.to_str().ok()?.parse::<u64>().ok())
        .unwrap_or(0);
    let limit = app.config.limits.upload_bytes;
    if announced > limit {
        return Err(upload_too_large(limit));
    }
    require_room(app, announced)
}

fn upload_too_large(limit: u64) -> ApiError {
    ApiError::new(
        Code::BodyTooLarge,
        format!("An upload may have at most {} MiB.", limit >> 20),
    )
}

/// Refuses what would leave too little space on the disk.
pub(super) fn require_room(app: &App, announced: u64) -> ApiResult<()> {
    let free = crate::space::free_bytes(&app.data.tmp()).map_err(ApiError::internal)?;
    let needed = announced.saturating_add(app.config.storage.min_free_bytes);
    if free < needed {
        let detail = format!(
            "What comes in ({} MiB) must leave {} MiB free on the disk; {} MiB are free.",
            announced >> 20,
            app.config.storage.min_free_bytes >> 20,
            free >> 20
        );
        return Err(ApiError::new(Code::StorageFull, detail));
    }
    Ok(())
}

/// An uploaded file, lying in staging until this is dropped.
#[derive(Debug)]
pub(super) struct Upload {
    pub(super) file: NamedTempFile,
    pub(super) bytes: u64,
    pub(super) sha256: String,
    /// The name that the client gave, if any; for people only.
    pub(super) name: Option<String>,
}

/// Writes one part of a multipart body to staging, counted and hashed.
pub(super) async fn upload(mut field: Field<'_>, staging: &Path, limit: u64) -> ApiResult<Upload> {
    let name = field.file_name().map(str::to_owned);
    let mut file = tempfile::Builder::new()
        .prefix("upload-")
        .tempfile_in(staging)
        .map_err(ApiError::write)?;
    let mut sha256 = Sha256::new();
    let mut bytes = 0u64;
    loop {
        let next = tokio::time::timeout(BODY_PAUSE, field.chunk()).await;
        let Some(chunk) = next
            .map_err(|_| ApiError::new(Code::Timeout, "The upload stopped coming."))?
            .map_err(multipart_error)?
        else {
            break;
        };
        bytes += chunk.len() as u64;
        if bytes > limit {
            return Err(upload_too_large(limit));
        }
        // Chunks are small (tens of KiB) and go to the page cache, so a blocking write here costs microseconds.
        sha256.update(&chunk);
        lorad_faults::write_all(Point::WriteUpload, &mut file, &chunk).map_err(ApiError::write)?;
    }
    Ok(Upload {
        file,
        bytes,
        sha256: hex::encode(sha256.finalize()),
        name,
    })
}

/// A text part of a multipart body.
pub(super) async fn text_part(mut field: Field<'_>, limit: usize) -> ApiResult<Vec<u8>> {
    let mut bytes = Vec::new();
    while let Some(chunk) = tokio::time::timeout(BODY_PAUSE, field.chunk())
        .await
        .map_err(|_| ApiError::new(Code::Timeout, "The body stopped coming."))?
        .map_err(multipart_error)?
    {
        if bytes.len() + chunk.len() > limit {
            return Err(ApiError::new(
                Code::BodyTooLarge,
                format!("This part may have at most {limit} bytes."),
            ));
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok(bytes)
}

/// What is wrong with a multipart body.
#[expect(clippy::needless_pass_by_value, reason = "for `map_err`")]
pub(super) fn multipart_error(error: MultipartError) -> ApiError {
    if error.status() == axum::http::StatusCode::PAYLOAD_TOO_LARGE {
        return ApiError::new(Code::BodyTooLarge, "The upload is larger than the server takes.");
    }
    ApiError::new(Code::Multipart, "The form data is malformed or broke off.")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]

    use serde_json::json;

    use super::*;

    #[test]
    fn every_fault_of_an_object_is_found_at_once_under_its_pointer() {
        let mut errors = Vec::new();
        let value =
            json!({"name": "a\u{7}", "n": 1.5, "m": -3, "b": "yes", "tags": ["ok", 3], "odd/one": 1, "z": 1e300});
        let mut fields = Fields::of(value, "/x", &mut errors);
        assert_eq!(fields.label("name", 10), None);
        assert_eq!(fields.integer("n", 0..=9), None);
        assert_eq!(fields.integer("m", 0..=9), None);
        assert_eq!(fields.integer("z", 0..=9), None);
        assert_eq!(fields.boolean("b"), None);
        assert_eq!(fields.labels("tags", 5, 5), Some(vec!["ok".to_owned()]));
        assert_eq!(fields.required_string("missing"), None);
        fields.finish();
        let found: Vec<_> = errors.iter().map(|e| (e.pointer.as_str(), e.code.as_str())).collect();
        assert_eq!(
            found,
            [
                ("/x/name", "invalid_characters"),
                ("/x/n", "wrong_type"),
                ("/x/m", "out_of_range"),
                ("/x/z", "out_of_range"),
                ("/x/b", "wrong_type"),
                ("/x/tags/1", "wrong_type"),
                ("/x/missing", "required"),
                ("/x/odd~1one", "unknown_field"),
            ]
        );
    }

    #[test]
    fn whole_numbers_written_with_a_point_are_whole() {
        let mut errors = Vec::new();
        let mut fields = Fields::of(json!({"n": 7.0}), "", &mut errors);
        assert_eq!(fields.integer("n", 0..=9), Some(7));
    }
}
