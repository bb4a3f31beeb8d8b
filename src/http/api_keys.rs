//! Managing API keys. The text of a key is shown once, in the answer that makes it.

use std::sync::Arc;

use axum::{
    Extension, Json,
    body::Body,
    extract::{Path, State},
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse as _, Response},
};
use jiff::Timestamp;
use serde::Serialize;
use serde_json::Value;
use utoipa::ToSchema;

use super::{
    access::Access,
    body::{self, Fields},
    dto::{List, key_id, rfc3339},
    error::{ApiError, ApiResult, ProblemDto},
};
use crate::{
    app::App,
    domain::{ApiKey, ApiKeyPatch, NewApiKey, Quota, Scope, now_ms},
    secret::Key,
};

/// An API key.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = ApiKey)]
pub(super) struct ApiKeyDto {
    /// `key_…`
    pub id: String,
    /// For people.
    pub name: String,
    /// What it may do: `read`, `submit` (also change) or `admin` (also manage).
    pub scope: &'static str,
    /// Its first characters.
    pub prefix: String,
    /// `valid`, `expired` or `revoked`.
    pub status: &'static str,
    /// What it may use; null: no limit beside the server's own.
    pub quota: QuotaDto,
    /// When it was made.
    pub created_at: String,
    /// When it ends.
    pub expires_at: Option<String>,
    /// When it was revoked.
    pub revoked_at: Option<String>,
    /// When it was last used, to the minute.
    pub last_used_at: Option<String>,
    /// The key itself; only in the answer that makes it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
}

/// What a key may use.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Quota)]
pub(super) struct QuotaDto {
    /// Requests in a minute.
    pub requests_per_minute: Option<u32>,
    /// Jobs that wait.
    pub queued_jobs: Option<u32>,
    /// Jobs at work at the same time; more wait.
    pub running_jobs: Option<u32>,
    /// All its datasets together.
    pub dataset_bytes: Option<u64>,
}

fn describe(key: &ApiKey, text: Option<&Key>) -> ApiKeyDto {
    let status = match key.revoked_at_ms {
        Some(_) => "revoked",
        None if key.is_valid(now_ms()) => "valid",
        None => "expired",
    };
    ApiKeyDto {
        id: key.id.to_string(),
        name: key.name.clone(),
        scope: key.scope.as_str(),
        prefix: key.prefix.clone(),
        status,
        quota: QuotaDto {
            requests_per_minute: key.quota.requests_per_minute,
            queued_jobs: key.quota.queued_jobs,
            running_jobs: key.quota.running_jobs,
            dataset_bytes: key.quota.dataset_bytes,
        },
        created_at: rfc3339(key.created_at_ms),
        expires_at: key.expires_at_ms.map(rfc3339),
        revoked_at: key.revoked_at_ms.map(rfc3339),
        last_used_at: key.last_used_at_ms.map(rfc3339),
        key: text.map(|key| key.reveal().to_owned()),
    }
}

/// Lists every key that was ever made, newest first.
#[utoipa::path(get, path = "/api-keys", tag = "access", responses((status = 200, body = List<ApiKeyDto>)))]
pub(super) async fn list_keys(State(app): State<App>) -> ApiResult<Json<List<ApiKeyDto>>> {
    let keys = app.store.keys().await?;
    Ok(Json(List::complete(
        keys.iter().map(|key| describe(key, None)).collect(),
    )))
}

/// Reads a key, without its text.
#[utoipa::path(get, path = "/api-keys/{id}", tag = "access", params(("id" = String, Path, description = "`key_…`")), responses(
    (status = 200, body = ApiKeyDto), (status = 404, body = ProblemDto)))]
pub(super) async fn get_key(State(app): State<App>, Path(id): Path<String>) -> ApiResult<Json<ApiKeyDto>> {
    Ok(Json(describe(&app.store.key(key_id(&id)?).await?, None)))
}

/// A key to make.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = ApiKeyRequest)]
pub(super) struct ApiKeyRequestDto {
    /// 1 to 100 characters.
    pub name: String,
    /// `read`, `submit` or `admin`.
    pub scope: String,
    /// RFC 3339; left out: never.
    pub expires_at: Option<String>,
    /// Left out: no limit beside the server's own.
    pub quota: Option<QuotaDto>,
}

/// Makes a key and shows it, this once. The first key locks the server, so it must be an `admin` one.
#[utoipa::path(post, path = "/api-keys", tag = "access", request_body = ApiKeyRequestDto, responses(
    (status = 201, body = ApiKeyDto, headers(("Location" = String))), (status = 422, body = ProblemDto)))]
pub(super) async fn create_key(
    State(app): State<App>,
    Extension(access): Extension<Arc<Access>>,
    headers: HeaderMap,
    body: Body,
) -> ApiResult<Response> {
    let value = body::json(&headers, body).await?;
    let mut errors = Vec::new();
    let mut fields = Fields::of(value, "", &mut errors);
    let name = fields.required_string("name").map(|name| name.trim().to_owned());
    let name = name.filter(|name| fields.check_label("name", name, 100));
    let scope = scope(&mut fields);
    if scope.is_some_and(|scope| scope != Scope::Admin) && !access.is_locked().await? {
        let detail = "the first key must be an admin one: it locks the server, and only an admin key makes others";
        fields.fault("scope", "contradiction", detail);
    }
    let expires_at_ms = time(&mut fields, "expires_at");
    let quota = fields.object("quota");
    fields.finish();
    let quota = quota_of(quota.map(Value::Object), &mut errors);
    let (Some(name), Some(scope), true) = (name, scope, errors.is_empty()) else {
        return Err(ApiError::fields(errors));
    };
    let key = Key::random().map_err(ApiError::internal)?;
    let new = NewApiKey {
        name,
        scope,
        prefix: key.prefix().to_owned(),
        sha256: key.sha256(),
        expires_at_ms,
        quota: quota.unwrap_or_default(),
    };
    let stored = app.store.insert_key(&new).await?;
    tracing::info!(key.id = %stored.id, scope = %stored.scope, "an API key was made");
    let head = [
        (header::LOCATION, format!("/api-keys/{}", stored.id)),
        (header::CACHE_CONTROL, "no-store".to_owned()),
    ];
    Ok((StatusCode::CREATED, head, Json(describe(&stored, Some(&key)))).into_response())
}

/// What to change.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = ApiKeyPatch)]
pub(super) struct ApiKeyPatchDto {
    /// 1 to 100 characters.
    pub name: Option<String>,
    /// RFC 3339.
    pub expires_at: Option<String>,
    /// All quotas anew.
    pub quota: Option<QuotaDto>,
}

/// Changes a key's name, end or quotas. A key that may do more is a new key.
#[utoipa::path(patch, path = "/api-keys/{id}", tag = "access", params(("id" = String, Path)), request_body = ApiKeyPatchDto, responses(
    (status = 200, body = ApiKeyDto), (status = 404, body = ProblemDto), (status = 422, body = ProblemDto)))]
pub(super) async fn patch_key(
    State(app): State<App>,
    Path(id): Path<String>,
    headers: HeaderMap,
    body: Body,
) -> ApiResult<Json<ApiKeyDto>> {
    let id = key_id(&id)?;
    let value = body::json(&headers, body).await?;
    let mut errors = Vec::new();
    let mut fields = Fields::of(value, "", &mut errors);
    let name = fields.label("name", 100);
    let expires_at_ms = time(&mut fields, "expires_at");
    let quota = fields.object("quota");
    fields.finish();
    let quota = quota_of(quota.map(Value::Object), &mut errors);
    if !errors.is_empty() {
        return Err(ApiError::fields(errors));
    }
    let patch = ApiKeyPatch {
        name,
        expires_at_ms: expires_at_ms.map(Some),
        quota,
    };
    Ok(Json(describe(&app.store.update_key(id, &patch).await?, None)))
}

/// Revokes a key, at once; its sessions end. The row stays in the list.
#[utoipa::path(delete, path = "/api-keys/{id}", tag = "access", params(("id" = String, Path)), responses(
    (status = 204), (status = 404, body = ProblemDto), (status = 409, body = ProblemDto, description = "it is the last admin key")))]
pub(super) async fn revoke_key(State(app): State<App>, Path(id): Path<String>) -> ApiResult<StatusCode> {
    app.store.revoke_key(key_id(&id)?, true).await?;
    Ok(StatusCode::NO_CONTENT)
}

fn scope(fields: &mut Fields<'_>) -> Option<Scope> {
    let text = fields.required_string("scope")?;
    let scope = Scope::parse(&text);
    if scope.is_none() {
        fields.fault("scope", "unknown_value", "must be read, submit or admin");
    }
    scope
}

/// A time in the future.
fn time(fields: &mut Fields<'_>, name: &'static str) -> Option<i64> {
    let text = fields.string(name)?;
    match text.parse::<Timestamp>() {
        Ok(time) if time.as_millisecond() > now_ms() => Some(time.as_millisecond()),
        Ok(_) => {
            fields.fault(name, "out_of_range", "lies in the past");
            None
        }
        Err(_) => {
            fields.fault(name, "invalid_value", "must be a time like 2030-01-31T12:00:00Z");
            None
        }
    }
}

fn quota_of(value: Option<Value>, errors: &mut Vec<lorad_proto::problem::FieldError>) -> Option<Quota> {
    let mut fields = Fields::of(value?, "/quota", errors);
    let small = |n: i64| u32::try_from(n).ok();
    let quota = Quota {
        requests_per_minute: fields.integer("requests_per_minute", 1..=1_000_000).and_then(small),
        queued_jobs: fields.integer("queued_jobs", 0..=1_000_000).and_then(small),
        running_jobs: fields.integer("running_jobs", 0..=1_000_000).and_then(small),
        dataset_bytes: fields.integer("dataset_bytes", 0..=1 << 50).map(i64::unsigned_abs),
    };
    fields.finish();
    Some(quota)
}
