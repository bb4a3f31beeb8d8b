//! Shapes that several resources share: lists, ids in paths, times.

use std::str::FromStr;

use axum::http::{HeaderMap, HeaderValue, header};
use jiff::Timestamp;
use serde::Serialize;
use sha2::{Digest as _, Sha256};
use utoipa::ToSchema;

use super::error::{ApiError, ApiResult, Code};
use crate::domain::{DatasetId, JobId, KeyId, MessageId, ModelId, WebhookId};

/// A list, or one page of it.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct List<T> {
    /// Always `list`.
    pub object: &'static str,
    /// The entries.
    pub data: Vec<T>,
    /// Whether more follow; ask with `after=<last_id>`.
    pub has_more: bool,
    /// Id of the first entry here.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first_id: Option<String>,
    /// Id of the last entry here.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_id: Option<String>,
    /// For results of a job: everything up to this event is contained; events after it come with
    /// `GET /jobs/{id}/events?after=`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cursor: Option<String>,
}

impl<T> List<T> {
    /// A complete list.
    pub(super) fn complete(data: Vec<T>) -> Self {
        Self {
            object: "list",
            data,
            has_more: false,
            first_id: None,
            last_id: None,
            cursor: None,
        }
    }
}

/// Milliseconds since the epoch as RFC 3339, UTC.
pub(super) fn rfc3339(ms: i64) -> String {
    Timestamp::from_millisecond(ms).map_or_else(|_| "1970-01-01T00:00:00Z".to_owned(), |t| t.to_string())
}

fn id<T: FromStr>(text: &str, code: Code, what: &str) -> ApiResult<T> {
    // A malformed id names nothing, so it is not found; what was asked is repeated only in part.
    text.parse().map_err(|_| {
        let shown: String = text.chars().take(80).collect();
        ApiError::new(code, format!("There is no {what} {shown:?}."))
    })
}

/// A job's id from a path.
pub(super) fn job_id(text: &str) -> ApiResult<JobId> {
    id(text, Code::JobNotFound, "job")
}

/// A dataset's id from a path.
pub(super) fn dataset_id(text: &str) -> ApiResult<DatasetId> {
    id(text, Code::DatasetNotFound, "dataset")
}

/// A key's id from a path.
pub(super) fn key_id(text: &str) -> ApiResult<KeyId> {
    id(text, Code::KeyNotFound, "key")
}

/// A webhook's id from a path.
pub(super) fn webhook_id(text: &str) -> ApiResult<WebhookId> {
    id(text, Code::WebhookNotFound, "webhook")
}

/// A delivery's id from a path or a cursor.
pub(super) fn message_id(text: &str) -> ApiResult<MessageId> {
    id(text, Code::DeliveryNotFound, "delivery")
}

/// A model's id from a path.
pub(super) fn model_id(text: &str) -> ApiResult<ModelId> {
    id(text, Code::ModelNotFound, "model")
}

/// A strong `ETag` of a body.
pub(super) fn etag_of(bytes: &[u8]) -> String {
    format!("\"{}\"", hex::encode(&Sha256::digest(bytes)[..16]))
}

/// Whether `header` (If-Match, If-None-Match) lists `etag`. `weak`: compare without `W/`.
pub(super) fn lists_etag(headers: &HeaderMap, header: header::HeaderName, etag: &str) -> Option<bool> {
    let values: Vec<&HeaderValue> = headers.get_all(header).iter().collect();
    if values.is_empty() {
        return None;
    }
    Some(values.iter().any(|value| {
        value.to_str().is_ok_and(|text| {
            text.split(',')
                .map(|tag| tag.trim().trim_start_matches("W/"))
                .any(|tag| tag == "*" || tag == etag)
        })
    }))
}

/// What a client wants, of what there is. The first of `offers` is the default.
pub(super) fn negotiate<'a>(
    headers: &HeaderMap,
    format: Option<&str>,
    offers: &[(&'a str, &str)],
) -> ApiResult<&'a str> {
    let names: Vec<&str> = offers.iter().map(|(name, _)| *name).collect();
    if let Some(format) = format {
        return offers
            .iter()
            .map(|(name, _)| *name)
            .find(|name| *name == format)
            .ok_or_else(|| {
                ApiError::new(
                    Code::InvalidQuery,
                    format!("`format` must be one of {}.", names.join(", ")),
                )
            });
    }
    let accept = headers
        .get(header::ACCEPT)
        .and_then(|v| v.to_str().ok())
        .unwrap_or("*/*");
    let mut wanted = accept
        .split(',')
        .map(|part| part.split(';').next().unwrap_or("").trim());
    let found = wanted.find_map(|media| match media {
        "*/*" | "" => offers.first(),
        _ => offers.iter().find(|(_, offer)| {
            *offer == media
                || media
                    .strip_suffix("/*")
                    .is_some_and(|t| offer.starts_with(&format!("{t}/")))
        }),
    });
    found.map(|(name, _)| *name).ok_or_else(|| {
        let types: Vec<&str> = offers.iter().map(|(_, media)| *media).collect();
        ApiError::new(Code::NotAcceptable, format!("Available are {}.", types.join(", ")))
    })
}
