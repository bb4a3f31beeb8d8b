//! Who asks, and whether they may: API keys, session cookies, and [`scope_of`], the one table of what each route needs.
//!
//! A server on which no key was ever made, and which listens on loopback, is open. The first key locks it, at once and for
//! good: a key that ends never opens it again. Used by [`super::router`].

use std::{
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use axum::{
    extract::{MatchedPath, Request, State},
    http::{HeaderMap, Method, StatusCode, header, request::Parts},
    middleware::Next,
    response::{IntoResponse as _, Response},
};
use utoipa::openapi::{
    OpenApi,
    path::{Operation, PathItem},
    security::{ApiKey as ApiKeyScheme, ApiKeyValue, HttpAuthScheme, HttpBuilder, SecurityRequirement, SecurityScheme},
};

use super::{
    audit, client,
    error::{ApiError, ApiResult, Code},
    guard,
    limiter::{Limiter, Verdict, Who},
};
use crate::{
    app::App,
    config::Auth,
    domain::{ApiKey, KeyId, Scope, now_ms},
    secret::{self, Key},
};

/// Name of the session cookie.
pub(super) const COOKIE: &str = "lorad_session";
/// Requests without a valid key, and sign-ins, from one address in a minute.
const GUESSES_PER_MINUTE: u32 = 120;
const BEARER: &str = "api_key";
const SESSION: &str = "session";

/// What a route needs; `None`: nothing. `route` is the route's pattern, e.g. `/jobs/{id}`.
///
/// The only declaration of this. The middleware obeys it, the OpenAPI document shows it, and a test walks every route. A new
/// route needs `read` for reading and `submit` for changing until it is named here.
pub(super) fn scope_of(method: &Method, route: &str) -> Option<Scope> {
    let reads = matches!(*method, Method::GET | Method::HEAD);
    // It answers with a secret.
    if route == "/jobs/{id}/webhook" {
        return Some(Scope::Submit);
    }
    let first = route.split('/').nth(1).unwrap_or("");
    match first {
        "livez" | "readyz" | "session" => None,
        "api-keys" | "audit" | "webhooks" => Some(Scope::Admin),
        "models" if !reads => Some(Scope::Admin),
        _ if reads => Some(Scope::Read),
        _ => Some(Scope::Submit),
    }
}

/// Who sent a request.
#[derive(Debug, Clone)]
pub(super) struct Caller {
    /// The key, on a locked server always there except on routes that need none.
    pub(super) key: Option<ApiKey>,
    /// Where from.
    pub(super) address: IpAddr,
}

impl Caller {
    /// Whom new jobs and datasets belong to.
    pub(super) fn owner(&self) -> Option<KeyId> {
        self.key.as_ref().map(|key| key.id)
    }
}

/// The gate. One per router.
#[derive(Debug)]
pub(super) struct Access {
    app: App,
    locked: AtomicBool,
    limiter: Limiter,
}

impl Access {
    pub(super) fn new(app: App) -> Arc<Self> {
        let server = &app.config.server;
        let exposed = !server.bind.ip().is_loopback() && !server.insecure_no_auth;
        let locked = AtomicBool::new(server.auth == Auth::Required || exposed);
        Arc::new(Self {
            app,
            locked,
            limiter: Limiter::default(),
        })
    }

    /// Whether requests need a key.
    pub(super) async fn is_locked(&self) -> ApiResult<bool> {
        if self.locked.load(Ordering::Relaxed) {
            return Ok(true);
        }
        // Asked with every request of an open server: `lorad keys create` makes keys beside a running one.
        let locked = self.app.store.has_keys().await?;
        self.locked.fetch_or(locked, Ordering::Relaxed);
        Ok(locked)
    }

    /// The key behind a request's credentials: `Ok(None)` if it has none.
    async fn key_of(&self, headers: &HeaderMap) -> ApiResult<Option<ApiKey>> {
        let now = now_ms();
        let found = match Credential::of(headers)? {
            Credential::None => return Ok(None),
            Credential::Key(key) => self.find(&key).await?,
            Credential::Session(cookie) => self.app.store.session_key(&secret::sha256_hex(&cookie), now).await?,
        };
        let key = found.filter(|key| key.is_valid(now)).ok_or_else(invalid)?;
        if let Err(error) = self.app.store.note_key_use(&key, now).await {
            tracing::warn!(key.id = %key.id, error = &error as &dyn std::error::Error, "a key's use was not noted");
        }
        Ok(Some(key))
    }

    /// The valid key with this text.
    pub(super) async fn valid_key(&self, text: &str) -> ApiResult<ApiKey> {
        let key = Key::parse(text).ok_or_else(invalid)?;
        self.find(&key)
            .await?
            .filter(|key| key.is_valid(now_ms()))
            .ok_or_else(invalid)
    }

    async fn find(&self, key: &Key) -> ApiResult<Option<ApiKey>> {
        let stored = self.app.store.key_by_prefix(key.prefix()).await?;
        Ok(stored
            .filter(|(_, sha256)| secret::same(sha256, &key.sha256()))
            .map(|(key, _)| key))
    }

    /// Who sent the request, and whether it may go on.
    async fn admit(&self, request: &Parts) -> (Caller, ApiResult<()>) {
        let address = client::address(request, &self.app.config.server.trusted_proxies);
        let mut caller = Caller { key: None, address };
        let allowed = self.check(request, &mut caller).await;
        (caller, allowed)
    }

    async fn check(&self, request: &Parts, caller: &mut Caller) -> ApiResult<()> {
        let headers = &request.headers;
        let Some(needs) = needs(request) else {
            caller.key = self.key_of(headers).await.unwrap_or_default();
            return Ok(());
        };
        if !self.is_locked().await? {
            return Ok(());
        }
        let key = self.key_of(headers).await?.ok_or_else(|| {
            ApiError::new(
                Code::AuthRequired,
                "The request carries neither an API key nor a session.",
            )
        })?;
        let key = caller.key.insert(key);
        // A browser says where a change comes from. A cookie alone, which it sends by itself, is no proof of intent.
        let by_cookie = !headers.contains_key(header::AUTHORIZATION);
        if by_cookie && !request.method.is_safe() && !guard::names_its_origin(headers) {
            let detail = "A change with a session cookie must say where it comes from (Origin or Sec-Fetch-Site).";
            return Err(ApiError::new(Code::OriginNotAllowed, detail));
        }
        if !key.scope.covers(needs) {
            let detail = format!(
                "This needs a key with the scope {needs}; the one given has {}.",
                key.scope
            );
            return Err(ApiError::new(Code::ScopeTooSmall, detail).with_extra("scope", needs));
        }
        Ok(())
    }

    /// Takes the request from its sender's bucket; `None`: it is not counted.
    fn count(&self, request: &Parts, caller: &Caller, allowed: &ApiResult<()>) -> Option<Verdict> {
        let now = Instant::now();
        let safe = request.method.is_safe();
        let unknown = allowed
            .as_ref()
            .is_err_and(|error| error.status() == StatusCode::UNAUTHORIZED);
        let needs_nothing = needs(request).is_none();
        if unknown || (needs_nothing && !safe) {
            let who = Who::guesses(caller.address);
            return Some(self.limiter.take(who, GUESSES_PER_MINUTE, now));
        }
        let general = self.app.config.limits.requests_per_minute;
        let (who, per_minute) = match &caller.key {
            Some(key) => (Who::Key(key.id), key.quota.requests_per_minute.unwrap_or(general)),
            None => (Who::address(caller.address), general),
        };
        // Probes and the dashboard's files cost nothing.
        (!needs_nothing && per_minute > 0).then(|| self.limiter.take(who, per_minute, now))
    }
}

/// What the request's route needs; without a route it is a file of the dashboard, which is no secret, or nothing at all.
fn needs(request: &Parts) -> Option<Scope> {
    let route = request.extensions.get::<MatchedPath>()?;
    scope_of(&request.method, route.as_str())
}

fn invalid() -> ApiError {
    ApiError::new(
        Code::AuthInvalid,
        "The key or session is not known, has ended, or was revoked.",
    )
}

/// What a request carries to show who it is. Never the address: keys in addresses end up in logs and histories.
enum Credential {
    None,
    Key(Key),
    Session(String),
}

impl Credential {
    fn of(headers: &HeaderMap) -> ApiResult<Self> {
        if let Some(value) = headers.get(header::AUTHORIZATION) {
            let text = value.to_str().unwrap_or("");
            let (scheme, rest) = text.split_once(' ').unwrap_or((text, ""));
            return if scheme.eq_ignore_ascii_case("bearer") {
                Key::parse(rest.trim()).map(Self::Key).ok_or_else(invalid)
            } else {
                Err(invalid())
            };
        }
        Ok(session_cookie(headers).map_or(Self::None, Self::Session))
    }
}

/// Value of the session cookie.
pub(super) fn session_cookie(headers: &HeaderMap) -> Option<String> {
    let pairs = headers
        .get_all(header::COOKIE)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|text| text.split(';'));
    pairs
        .filter_map(|pair| pair.trim().split_once('='))
        .find_map(|(name, value)| (name == COOKIE).then(|| value.to_owned()))
}

/// Lets through who may and is not in haste, and tells the handler who it is ([`Caller`], an extension).
pub(super) async fn authorize(State(access): State<Arc<Access>>, request: Request, next: Next) -> Response {
    // Without the body, which may not be shared between threads.
    let (parts, body) = request.into_parts();
    let (caller, allowed) = access.admit(&parts).await;
    let verdict = access.count(&parts, &caller, &allowed);
    let mut response = match (verdict, allowed) {
        (Some(verdict), _) if !verdict.allowed => too_many(verdict).into_response(),
        (_, Err(error)) => {
            audit::refused(access.app.clone(), &caller, &parts, &error);
            error.into_response()
        }
        (_, Ok(())) => {
            let mut request = Request::from_parts(parts, body);
            request.extensions_mut().insert(caller.clone());
            audit::record(access.app.clone(), &caller, request, next).await
        }
    };
    response
        .headers_mut()
        .extend(verdict.into_iter().flat_map(Verdict::headers));
    response
}

fn too_many(verdict: Verdict) -> ApiError {
    let seconds = verdict.retry_after_s;
    ApiError::new(
        Code::RateLimited,
        format!("Too many requests in a minute; the next one may come in {seconds} s."),
    )
    .with_retry_after(seconds)
}

/// Writes into the document what each operation needs.
pub(super) fn document(openapi: &mut OpenApi) {
    let components = openapi.components.get_or_insert_default();
    let bearer = HttpBuilder::new()
        .scheme(HttpAuthScheme::Bearer)
        .bearer_format("lorad_ and 80 hex digits")
        .description(Some(
            "An API key. Needed as soon as one exists; the scope that an operation needs stands with it: `read`, `submit` \
             (holds `read`) or `admin` (holds both).",
        ));
    components.add_security_scheme(BEARER, SecurityScheme::Http(bearer.build()));
    let cookie = ApiKeyValue::with_description(COOKIE, "What `POST /session` gives a browser for its key.");
    components.add_security_scheme(SESSION, SecurityScheme::ApiKey(ApiKeyScheme::Cookie(cookie)));
    for (path, item) in &mut openapi.paths.paths {
        for (method, operation) in operations(item) {
            let needs = scope_of(&method, path);
            let requirement = |name: &str| needs.map(|scope| SecurityRequirement::new(name, [scope.as_str()]));
            operation.security = Some([BEARER, SESSION].into_iter().filter_map(requirement).collect());
        }
    }
}

fn operations(item: &mut PathItem) -> impl Iterator<Item = (Method, &mut Operation)> {
    [
        (Method::GET, &mut item.get),
        (Method::HEAD, &mut item.head),
        (Method::POST, &mut item.post),
        (Method::PUT, &mut item.put),
        (Method::PATCH, &mut item.patch),
        (Method::DELETE, &mut item.delete),
    ]
    .into_iter()
    .filter_map(|(method, operation)| operation.as_mut().map(|operation| (method, operation)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cookie_is_found_among_others_and_not_in_anothers_name() {
        let find = |text: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::COOKIE, header::HeaderValue::from_static(text));
            session_cookie(&headers)
        };
        assert_eq!(find("a=b; lorad_session=xyz; c=d").as_deref(), Some("xyz"));
        assert_eq!(find("not_lorad_session=xyz"), None);
        assert_eq!(find("lorad_session"), None);
    }
}
