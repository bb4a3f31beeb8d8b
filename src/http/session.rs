//! Signing in: a browser trades an API key for a cookie that scripts cannot read and other sites cannot send.

use std::sync::Arc;

use axum::{
    Extension, Json,
    body::Body,
    extract::State,
    http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header},
    response::{IntoResponse as _, Response},
};
use serde::Serialize;
use utoipa::ToSchema;

use super::{
    access::{Access, COOKIE, Caller, session_cookie},
    body::{self, Fields},
    dto::rfc3339,
    error::{ApiError, ApiResult, ProblemDto},
};
use crate::{
    app::App,
    domain::{ApiKey, now_ms},
    secret,
};

const X_FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");

/// Who asks.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Session)]
pub(super) struct SessionDto {
    /// Whether requests need an API key.
    pub locked: bool,
    /// The key behind this request; null: none.
    pub key: Option<SessionKeyDto>,
}

/// A key in short.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = SessionKey)]
pub(super) struct SessionKeyDto {
    /// `key_…`
    pub id: String,
    /// For people.
    pub name: String,
    /// `read`, `submit` or `admin`.
    pub scope: &'static str,
    /// When it ends.
    pub expires_at: Option<String>,
}

impl From<&ApiKey> for SessionKeyDto {
    fn from(key: &ApiKey) -> Self {
        Self {
            id: key.id.to_string(),
            name: key.name.clone(),
            scope: key.scope.as_str(),
            expires_at: key.expires_at_ms.map(rfc3339),
        }
    }
}

/// Says whether a key is needed, and which one this request carries.
#[utoipa::path(get, path = "/session", tag = "access", responses((status = 200, body = SessionDto)))]
pub(super) async fn get_session(
    Extension(access): Extension<Arc<Access>>,
    Extension(caller): Extension<Caller>,
) -> ApiResult<Json<SessionDto>> {
    Ok(Json(SessionDto {
        locked: access.is_locked().await?,
        key: caller.key.as_ref().map(SessionKeyDto::from),
    }))
}

/// What to sign in with.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = SessionRequest)]
pub(super) struct SessionRequestDto {
    /// An API key.
    pub key: String,
}

/// Signs a browser in: trades a key for a cookie (`HttpOnly`, `SameSite=Strict`).
#[utoipa::path(post, path = "/session", tag = "access", request_body = SessionRequestDto, responses(
    (status = 201, body = SessionDto, headers(("Set-Cookie" = String))), (status = 401, body = ProblemDto), (status = 422, body = ProblemDto)))]
pub(super) async fn create_session(
    State(app): State<App>,
    Extension(access): Extension<Arc<Access>>,
    headers: HeaderMap,
    body: Body,
) -> ApiResult<Response> {
    let value = body::json(&headers, body).await?;
    let mut errors = Vec::new();
    let mut fields = Fields::of(value, "", &mut errors);
    let text = fields.required_string("key");
    fields.finish();
    let (Some(text), true) = (text, errors.is_empty()) else {
        return Err(ApiError::fields(errors));
    };
    let key = access.valid_key(text.trim()).await?;
    let seconds = app.config.server.session_hours * 3600;
    let ends = now_ms().saturating_add(i64::try_from(seconds * 1000).unwrap_or(i64::MAX));
    let ends = key.expires_at_ms.map_or(ends, |end| end.min(ends));
    let cookie = secret::random_hex::<32>().map_err(ApiError::internal)?;
    app.store
        .insert_session(&secret::sha256_hex(&cookie), key.id, ends)
        .await?;
    let answer = Json(SessionDto {
        locked: access.is_locked().await?,
        key: Some((&key).into()),
    });
    Ok((
        StatusCode::CREATED,
        [(header::SET_COOKIE, cookie_header(&headers, &cookie, seconds))],
        answer,
    )
        .into_response())
}

/// Signs out: the cookie opens nothing any more.
#[utoipa::path(delete, path = "/session", tag = "access", responses((status = 204, headers(("Set-Cookie" = String)))))]
pub(super) async fn delete_session(State(app): State<App>, headers: HeaderMap) -> ApiResult<Response> {
    if let Some(cookie) = session_cookie(&headers) {
        app.store.delete_session(&secret::sha256_hex(&cookie)).await?;
    }
    Ok((
        StatusCode::NO_CONTENT,
        [(header::SET_COOKIE, cookie_header(&headers, "", 0))],
    )
        .into_response())
}

/// `Secure` where the browser speaks TLS to the proxy in front. A client that lies about it only spoils its own cookie.
fn cookie_header(headers: &HeaderMap, value: &str, max_age_s: u64) -> HeaderValue {
    let tls = headers.get(X_FORWARDED_PROTO).is_some_and(|proto| proto == "https");
    let secure = if tls { "; Secure" } else { "" };
    let text = format!("{COOKIE}={value}; Path=/; Max-Age={max_age_s}; HttpOnly; SameSite=Strict{secure}");
    // Hex digits and fixed words are always a valid value.
    HeaderValue::from_str(&text).unwrap_or(HeaderValue::from_static(""))
}
