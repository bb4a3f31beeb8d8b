//! The audit log: every request that would change something, whoever sent it and whatever came of it.

use axum::{
    Json,
    extract::{Query, Request, State},
    http::{header, request::Parts},
    middleware::Next,
    response::Response,
};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::{
    access::Caller,
    dto::{List, rfc3339},
    error::{ApiError, ApiResult, Code, ProblemDto},
    guard::RequestId,
};
use crate::{
    app::App,
    domain::{AuditEntry, now_ms},
};

/// Told by nginx, and here, for a client that went before it was answered.
const CLIENT_GONE: u16 = 499;

/// An entry on its way into the log; dropped without [`Pending::done`], it says that the client went.
struct Pending {
    app: App,
    entry: Option<AuditEntry>,
}

impl Pending {
    fn done(mut self, status: u16, object: Option<String>) {
        if let Some(entry) = &mut self.entry {
            entry.status = status;
            entry.object = object;
        }
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        if let Some(entry) = self.entry.take() {
            let max_entries = self.app.config.server.audit_entries;
            self.app.store.note_audit(entry, max_entries);
        }
    }
}

/// Runs a request and writes it down if it is one that changes something.
pub(super) async fn record(app: App, caller: &Caller, request: Request, next: Next) -> Response {
    let (parts, body) = request.into_parts();
    let pending = pending(app, caller, &parts);
    let request = Request::from_parts(parts, body);
    let Some(pending) = pending else {
        return next.run(request).await;
    };
    let response = next.run(request).await;
    let made = response.headers().get(header::LOCATION).and_then(|at| at.to_str().ok());
    let object = made.and_then(|at| at.rsplit('/').next()).map(str::to_owned);
    pending.done(response.status().as_u16(), object);
    response
}

/// Writes down a request that was not let in.
pub(super) fn refused(app: App, caller: &Caller, request: &Parts, error: &ApiError) {
    if let Some(pending) = pending(app, caller, request) {
        pending.done(error.status().as_u16(), None);
    }
}

fn pending(app: App, caller: &Caller, request: &Parts) -> Option<Pending> {
    if request.method.is_safe() {
        return None;
    }
    let id = request.extensions.get::<RequestId>();
    let path: String = request
        .uri
        .path()
        .chars()
        .filter(|c| !c.is_control())
        .take(300)
        .collect();
    let entry = AuditEntry {
        id: 0,
        t_ms: now_ms(),
        key: caller.key.as_ref().map(|key| (key.id, key.name.clone())),
        address: caller.address.to_string(),
        method: request.method.to_string(),
        path,
        object: None,
        status: CLIENT_GONE,
        request_id: id.map(|id| id.0.clone()).unwrap_or_default(),
    };
    Some(Pending {
        app,
        entry: Some(entry),
    })
}

/// A request that changed something, or would have.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = AuditEntry)]
pub(super) struct AuditEntryDto {
    /// Grows with time.
    pub id: String,
    /// When.
    pub at: String,
    /// The key; null: none was asked for, or none was valid.
    pub key_id: Option<String>,
    /// The key's name as it was then.
    pub key_name: Option<String>,
    /// Where from.
    pub address: String,
    /// `POST`, `PATCH`, `DELETE`.
    pub method: String,
    /// What on, without the query.
    pub path: String,
    /// Id of what was made, where the path does not name it.
    pub object: Option<String>,
    /// `done`, `refused` (4xx) or `failed` (5xx).
    pub outcome: &'static str,
    /// HTTP status; 499: the client went before the answer.
    pub status: u16,
    /// The same as in the answer and in the server's log.
    pub request_id: String,
}

impl From<AuditEntry> for AuditEntryDto {
    fn from(entry: AuditEntry) -> Self {
        let outcome = match entry.status {
            ..400 => "done",
            400..500 => "refused",
            500.. => "failed",
        };
        let (key_id, key_name) = entry.key.map(|(id, name)| (id.to_string(), name)).unzip();
        Self {
            id: entry.id.to_string(),
            at: rfc3339(entry.t_ms),
            key_id,
            key_name,
            address: entry.address,
            method: entry.method,
            path: entry.path,
            object: entry.object,
            outcome,
            status: entry.status,
            request_id: entry.request_id,
        }
    }
}

/// Which entries.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
pub(super) struct AuditQuery {
    /// Only entries older than this one.
    after: Option<String>,
    /// 1 to 1000; by default 100.
    limit: Option<u32>,
}

/// Lists requests that changed something, or would have, newest first.
#[utoipa::path(get, path = "/audit", tag = "access", params(AuditQuery), responses(
    (status = 200, body = List<AuditEntryDto>), (status = 400, body = ProblemDto)))]
pub(super) async fn list_audit(
    State(app): State<App>,
    Query(query): Query<AuditQuery>,
) -> ApiResult<Json<List<AuditEntryDto>>> {
    let after = query.after.map(|id| id.parse::<i64>());
    let after = after
        .transpose()
        .map_err(|_| ApiError::new(Code::InvalidCursor, "`after` must be the id of an entry."))?;
    let limit = query.limit.unwrap_or(100);
    if !(1..=1000).contains(&limit) {
        return Err(ApiError::new(Code::InvalidQuery, "`limit` must be 1 to 1000."));
    }
    let (found, has_more) = app.store.audit(after, limit).await?;
    let data: Vec<AuditEntryDto> = found.into_iter().map(AuditEntryDto::from).collect();
    Ok(Json(List {
        has_more,
        first_id: data.first().map(|entry| entry.id.clone()),
        last_id: data.last().map(|entry| entry.id.clone()),
        ..List::complete(data)
    }))
}
