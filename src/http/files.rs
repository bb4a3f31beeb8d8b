//! What a job leaves behind as files: results, sample pictures, checkpoints. Downloads can be resumed (`curl -C -`).

use std::ops::Range;

use axum::{
    Json,
    body::Body,
    extract::{Path, State},
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{IntoResponse as _, Response},
};
use serde::Serialize;
use utoipa::ToSchema;

use super::{
    dto::{self, List, job_id, rfc3339},
    error::{ApiError, ApiResult, Code, ProblemDto},
    guard::FILE_CSP,
};
use crate::{
    app::App,
    domain::{Artifact, ArtifactKind, JobId, artifact::is_plain_file_name},
};

/// A result file.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = File)]
pub(super) struct FileDto {
    /// File name.
    pub name: String,
    /// `diffusers`, `kohya`, `peft`, `merged`, `receipt`, `config`.
    pub kind: &'static str,
    /// Size.
    pub bytes: u64,
    /// SHA-256, hex.
    pub sha256: String,
    /// Attempt that made it.
    pub attempt: u32,
    /// When it was published.
    pub created_at: String,
    /// Where to download it.
    pub url: String,
}

/// Lists a job's result files.
#[utoipa::path(get, path = "/jobs/{id}/files", tag = "results", params(("id" = String, Path)), responses(
    (status = 200, body = List<FileDto>), (status = 404, body = ProblemDto)))]
pub(super) async fn job_files(State(app): State<App>, Path(id): Path<String>) -> ApiResult<Json<List<FileDto>>> {
    let job = app.store.job(job_id(&id)?).await?;
    let artifacts = app.store.artifacts(job.id).await?;
    let results = artifacts.into_iter().filter(|a| a.kind != ArtifactKind::Sample);
    let data = results.map(|a| FileDto {
        url: file_url(job.id, &a.name),
        kind: a.kind.as_str(),
        bytes: a.bytes,
        sha256: a.sha256,
        attempt: a.attempt,
        created_at: rfc3339(a.created_at_ms),
        name: a.name,
    });
    Ok(Json(List::complete(data.collect())))
}

/// Address of a published file. Names are made by the server ([`lorad_proto::spec::file_stem`]), so nothing needs escaping.
pub(super) fn file_url(job: JobId, name: &str) -> String {
    format!("/jobs/{job}/files/{name}")
}

/// A sample picture.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Sample)]
pub(super) struct SampleDto {
    /// Optimizer steps completed when it was made; 0 is the base model.
    pub step: u64,
    /// Index into the job's prompts.
    pub prompt_index: u32,
    /// The prompt.
    pub prompt: String,
    /// Seed of its noise.
    pub seed: u64,
    /// Pixels.
    pub width: u32,
    /// Pixels.
    pub height: u32,
    /// When it was made.
    pub created_at: String,
    /// PNG.
    pub url: String,
}

/// Lists a job's sample pictures in order of step and prompt.
#[utoipa::path(get, path = "/jobs/{id}/samples", tag = "results", params(("id" = String, Path)), responses(
    (status = 200, body = List<SampleDto>), (status = 404, body = ProblemDto)))]
pub(super) async fn job_samples(State(app): State<App>, Path(id): Path<String>) -> ApiResult<Json<List<SampleDto>>> {
    let job = app.store.job(job_id(&id)?).await?;
    let samples = app.store.samples(job.id).await?.into_iter().map(|s| SampleDto {
        step: s.step,
        prompt_index: s.prompt_index,
        prompt: s.prompt,
        seed: s.seed,
        width: s.width,
        height: s.height,
        created_at: rfc3339(s.t_ms),
        url: file_url(job.id, &s.file),
    });
    Ok(Json(List {
        cursor: Some(job.last_seq.to_string()),
        ..List::complete(samples.collect())
    }))
}

/// A checkpoint.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Checkpoint)]
pub(super) struct CheckpointDto {
    /// Optimizer steps it holds.
    pub step: u64,
    /// Attempt that wrote it.
    pub attempt: u32,
    /// Size of all its files.
    pub bytes: u64,
    /// SHA-256 of its manifest, hex.
    pub sha256: String,
    /// When it was written.
    pub created_at: String,
    /// Whether it is still there: old ones are deleted.
    pub available: bool,
}

/// Lists a job's checkpoints, newest first.
#[utoipa::path(get, path = "/jobs/{id}/checkpoints", tag = "results", params(("id" = String, Path)), responses(
    (status = 200, body = List<CheckpointDto>), (status = 404, body = ProblemDto)))]
pub(super) async fn job_checkpoints(
    State(app): State<App>,
    Path(id): Path<String>,
) -> ApiResult<Json<List<CheckpointDto>>> {
    let job = app.store.job(job_id(&id)?).await?;
    let checkpoints = app.store.checkpoints(job.id).await?.into_iter().map(|c| CheckpointDto {
        step: c.step,
        attempt: c.attempt,
        bytes: c.bytes,
        sha256: c.sha256,
        created_at: rfc3339(c.t_ms),
        available: c.path.is_dir(),
    });
    Ok(Json(List {
        cursor: Some(job.last_seq.to_string()),
        ..List::complete(checkpoints.collect())
    }))
}

/// Downloads a file: `Range`, `If-Range`, `If-None-Match`; the `ETag` is its SHA-256.
#[utoipa::path(get, path = "/jobs/{id}/files/{name}", tag = "results", params(("id" = String, Path), ("name" = String, Path)), responses(
    (status = 200, content_type = "application/octet-stream", body = Vec<u8>, headers(("ETag" = String), ("Accept-Ranges" = String))),
    (status = 206, description = "the range"), (status = 304, description = "unchanged"), (status = 404, body = ProblemDto),
    (status = 412, body = ProblemDto), (status = 416, body = ProblemDto)))]
pub(super) async fn job_file(
    State(app): State<App>,
    Path((id, name)): Path<(String, String)>,
    headers: HeaderMap,
) -> ApiResult<Response> {
    serve(&app, &id, &name, &headers, true).await
}

/// Headers of a file.
#[utoipa::path(head, path = "/jobs/{id}/files/{name}", tag = "results", params(("id" = String, Path), ("name" = String, Path)), responses(
    (status = 200, headers(("ETag" = String), ("Accept-Ranges" = String), ("Content-Length" = u64))), (status = 404)))]
pub(super) async fn job_file_head(
    State(app): State<App>,
    Path((id, name)): Path<(String, String)>,
    headers: HeaderMap,
) -> ApiResult<Response> {
    serve(&app, &id, &name, &headers, false).await
}

async fn serve(app: &App, id: &str, name: &str, headers: &HeaderMap, with_body: bool) -> ApiResult<Response> {
    let job = job_id(id)?;
    if !is_plain_file_name(name) {
        return Err(ApiError::new(Code::FileNotFound, "There is no such file."));
    }
    let artifact = app.store.artifact(job, name).await?;
    let etag = format!("\"sha256-{}\"", artifact.sha256);
    if dto::lists_etag(headers, header::IF_MATCH, &etag) == Some(false) {
        return Err(ApiError::new(
            Code::PreconditionFailed,
            "The file is another one by now.",
        ));
    }
    if dto::lists_etag(headers, header::IF_NONE_MATCH, &etag) == Some(true) {
        return Ok(with_file_headers(
            StatusCode::NOT_MODIFIED.into_response(),
            &artifact,
            &etag,
        ));
    }
    let if_range = headers.get(header::IF_RANGE);
    let range = headers
        .get(header::RANGE)
        .and_then(|v| v.to_str().ok())
        // The file changed since the client got its first part: all of it.
        .filter(|_| if_range.is_none_or(|v| v.as_bytes() == etag.as_bytes()))
        .and_then(parse_range);
    let range = match range.map(|range| range.within(artifact.bytes)) {
        None => None,
        Some(Some(range)) => Some(range),
        Some(None) => {
            let error = ApiError::new(
                Code::RangeNotSatisfiable,
                format!("The file has {} bytes.", artifact.bytes),
            );
            let mut response = error.into_response();
            let total = HeaderValue::from_str(&format!("bytes */{}", artifact.bytes));
            response
                .headers_mut()
                .insert(header::CONTENT_RANGE, total.map_err(ApiError::internal)?);
            return Ok(response);
        }
    };
    let length = range.as_ref().map_or(artifact.bytes, |r| r.end - r.start);
    let body = if with_body && length > 0 {
        let content = app.blobs.open(job, name, range.clone()).await.map_err(|error| {
            if error.is_not_found() {
                ApiError::new(Code::FileNotFound, "The file was removed from the server's disk.")
            } else {
                ApiError::internal(error)
            }
        })?;
        Body::from_stream(content.stream)
    } else {
        Body::empty()
    };
    let mut response = Response::new(body);
    if let Some(range) = &range {
        *response.status_mut() = StatusCode::PARTIAL_CONTENT;
        let text = format!("bytes {}-{}/{}", range.start, range.end - 1, artifact.bytes);
        let value = HeaderValue::from_str(&text).map_err(ApiError::internal)?;
        response.headers_mut().insert(header::CONTENT_RANGE, value);
    }
    response.headers_mut().insert(header::CONTENT_LENGTH, length.into());
    Ok(with_file_headers(response, &artifact, &etag))
}

fn with_file_headers(mut response: Response, artifact: &Artifact, etag: &str) -> Response {
    let is_sample = artifact.kind == ArtifactKind::Sample;
    let name: String = artifact
        .name
        .chars()
        .map(|c| if c.is_ascii_graphic() && c != '"' { c } else { '_' })
        .collect();
    let disposition = if is_sample { "inline" } else { "attachment" };
    let media = if is_sample {
        "image/png"
    } else {
        media_type(&artifact.name)
    };
    let headers = response.headers_mut();
    let values = [
        (header::ETAG, etag.to_owned()),
        (header::ACCEPT_RANGES, "bytes".to_owned()),
        (header::CONTENT_TYPE, media.to_owned()),
        (
            header::CONTENT_DISPOSITION,
            format!("{disposition}; filename=\"{name}\""),
        ),
        (header::CONTENT_SECURITY_POLICY, FILE_CSP.to_owned()),
    ];
    for (name, value) in values {
        if let Ok(value) = HeaderValue::from_str(&value) {
            headers.insert(name, value);
        }
    }
    response
}

fn media_type(name: &str) -> &'static str {
    match name.rsplit('.').next() {
        Some("json") => "application/json",
        Some("zip") => "application/zip",
        _ => "application/octet-stream",
    }
}

/// One byte range as asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum AskedRange {
    From(u64),
    FromTo(u64, u64),
    Last(u64),
}

/// Reads a `Range` header. `None`: not one we serve (other unit, several ranges, malformed), so it is ignored, as
/// RFC 9110 §14.2 allows.
fn parse_range(header: &str) -> Option<AskedRange> {
    let spec = header.trim().strip_prefix("bytes=")?.trim();
    let (first, last) = spec.split_once('-')?;
    let number = |text: &str| {
        let text = text.trim();
        (!text.is_empty() && text.bytes().all(|b| b.is_ascii_digit())).then(|| text.parse::<u64>().unwrap_or(u64::MAX))
    };
    match (number(first), number(last)) {
        (Some(first), Some(last)) if first <= last => Some(AskedRange::FromTo(first, last)),
        (Some(first), None) if last.trim().is_empty() => Some(AskedRange::From(first)),
        (None, Some(n)) if first.trim().is_empty() => Some(AskedRange::Last(n)),
        _ => None,
    }
}

impl AskedRange {
    /// The bytes it means in a file of this size; `None`: none.
    fn within(self, size: u64) -> Option<Range<u64>> {
        let range = match self {
            Self::From(first) => first..size,
            Self::FromTo(first, last) => first..size.min(last.saturating_add(1)),
            Self::Last(n) => size.saturating_sub(n)..size,
        };
        (range.start < range.end).then_some(range)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_mean_what_rfc_9110_says() {
        let within = |header: &str, size| parse_range(header).map(|r| r.within(size));
        assert_eq!(within("bytes=0-0", 10), Some(Some(0..1)));
        assert_eq!(within("bytes=4-", 10), Some(Some(4..10)));
        assert_eq!(within("bytes=4-99999999999999999999", 10), Some(Some(4..10)));
        assert_eq!(within("bytes=-3", 10), Some(Some(7..10)));
        assert_eq!(within("bytes=-30", 10), Some(Some(0..10)));
        assert_eq!(within("bytes=10-", 10), Some(None));
        assert_eq!(within("bytes=-0", 10), Some(None));
        assert_eq!(within("bytes=0-", 0), Some(None));
    }

    #[test]
    fn ranges_that_are_not_served_are_ignored() {
        for header in [
            "bytes=3-1",
            "bytes=a-b",
            "bytes=0-1,3-4",
            "lines=0-1",
            "bytes=",
            "bytes=-",
            "bytes=+1-2",
        ] {
            assert_eq!(parse_range(header), None, "{header}");
        }
    }
}
