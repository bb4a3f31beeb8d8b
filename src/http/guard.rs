//! What every request passes: request id and error rendering, security headers, Host allow-list, cross-site check.
//!
//! Knows no resource. Used by [`super::router`] only.

use std::{net::IpAddr, sync::Arc};

use axum::{
    body::Body,
    extract::{MatchedPath, Request, State},
    http::{HeaderMap, HeaderName, HeaderValue, StatusCode, Uri, header},
    middleware::Next,
    response::{IntoResponse, Response},
};
use uuid::Uuid;

use super::error::{ApiError, Code, Unrendered};
use crate::{
    domain::JobId,
    traces::{Answered, Traces},
};

const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const SEC_FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");
const SEC_FETCH_MODE: HeaderName = HeaderName::from_static("sec-fetch-mode");
const SEC_FETCH_DEST: HeaderName = HeaderName::from_static("sec-fetch-dest");
/// No script, style or request but to this server; pictures also from memory. Nothing may frame the dashboard.
/// Trusted types without any policy: no script of the page can turn text into markup either.
const CSP: &str = "default-src 'self'; img-src 'self' blob: data:; object-src 'none'; base-uri 'none'; form-action 'self'; \
    frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'";
/// For files: nothing in them may run, even when opened.
pub(super) const FILE_CSP: &str = "default-src 'none'; sandbox; frame-ancestors 'none'";

/// The request's id; an extension of every request.
#[derive(Debug, Clone)]
pub(super) struct RequestId(pub(super) String);

/// Outermost: gives the request an id and a span, renders errors as problem+json, and sets the headers that every answer has.
pub(super) async fn request_context(State(traces): State<Traces>, mut request: Request, next: Next) -> Response {
    let id = format!("req_{}", Uuid::now_v7().simple());
    let method = request.method().clone();
    let path = request.uri().path().to_owned();
    let started = std::time::Instant::now();
    let span = traces
        .request(request.headers())
        .map(|span| (span, request.extensions().get::<MatchedPath>().cloned()));
    request.extensions_mut().insert(RequestId(id.clone()));
    let mut response = render(next.run(request).await, &id);
    tracing::debug!(
        request.id = id,
        %method,
        path,
        status = response.status().as_u16(),
        duration_ms = started.elapsed().as_secs_f64() * 1e3,
        "answered"
    );
    if let Some((span, route)) = span {
        let answered = Answered {
            request_id: &id,
            method: method.as_str(),
            path: &path,
            route: route.as_ref().map(MatchedPath::as_str),
            status: response.status().as_u16(),
            job: job_of(&path, &response),
        };
        traces.answered(span, &answered);
    }
    let headers = response.headers_mut();
    if let Ok(id) = HeaderValue::from_str(&id) {
        headers.insert(X_REQUEST_ID, id);
    }
    let fixed = [
        (header::CONTENT_SECURITY_POLICY, CSP),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::X_FRAME_OPTIONS, "DENY"),
        (header::REFERRER_POLICY, "no-referrer"),
        (
            HeaderName::from_static("permissions-policy"),
            "camera=(), geolocation=(), microphone=()",
        ),
        (HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
        (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
    ];
    for (name, value) in fixed {
        headers.entry(name).or_insert(HeaderValue::from_static(value));
    }
    headers
        .entry(header::CACHE_CONTROL)
        .or_insert(HeaderValue::from_static("no-cache"));
    response
}

/// The job that a request made, or else the one that its path names.
fn job_of(path: &str, response: &Response) -> Option<JobId> {
    let made = response.headers().get(header::LOCATION).and_then(|at| at.to_str().ok());
    let named = || path.strip_prefix("/jobs/")?.split('/').next();
    let made = made.and_then(|at| at.rsplit('/').next()?.parse().ok());
    made.or_else(|| named()?.parse().ok())
}

/// Renders our own errors, and turns the framework's plain ones into the same form.
fn render(response: Response, id: &str) -> Response {
    if let Some(Unrendered(error)) = response.extensions().get::<Unrendered>() {
        let mut rendered = error.render(id);
        // Set beside the error: the size of the file for a range outside it, what is left of a rate limit.
        for (name, value) in response
            .headers()
            .iter()
            .filter(|(name, _)| **name != header::CONTENT_LENGTH)
        {
            rendered.headers_mut().entry(name).or_insert(value.clone());
        }
        return rendered;
    }
    let status = response.status();
    let is_problem = response
        .headers()
        .get(header::CONTENT_TYPE)
        .is_some_and(|t| t.as_bytes().starts_with(b"application/problem+json"));
    if (!status.is_client_error() && !status.is_server_error()) || is_problem {
        return response;
    }
    let code = match status {
        StatusCode::NOT_FOUND => Code::RouteNotFound,
        StatusCode::METHOD_NOT_ALLOWED => Code::MethodNotAllowed,
        StatusCode::PAYLOAD_TOO_LARGE => Code::BodyTooLarge,
        StatusCode::REQUEST_TIMEOUT => Code::Timeout,
        StatusCode::UNSUPPORTED_MEDIA_TYPE => Code::NotJson,
        StatusCode::URI_TOO_LONG => Code::UriTooLong,
        s if s.is_client_error() => Code::InvalidQuery,
        _ => Code::Internal,
    };
    let mut rendered = ApiError::new(code, format!("{}.", code.title())).render(id);
    if let Some(allow) = response.headers().get(header::ALLOW) {
        rendered.headers_mut().insert(header::ALLOW, allow.clone());
    }
    rendered
}

/// Host names that requests may name, beside IP addresses and localhost.
#[derive(Debug, Clone, Default)]
pub(super) struct AllowedHosts(pub Arc<Vec<String>>);

impl AllowedHosts {
    fn has(&self, name: &str) -> bool {
        self.0.iter().any(|host| host.eq_ignore_ascii_case(name))
    }
}

/// Refuses requests whose Host is a name that nobody configured (DNS rebinding). An IP address is always fine: a page
/// of another site cannot make a browser send one that is not its own.
pub(super) async fn host_allow_list(State(allowed): State<AllowedHosts>, request: Request, next: Next) -> Response {
    let authority = authority(request.headers(), request.uri());
    let Some(authority) = authority else {
        return ApiError::new(Code::HostNotAllowed, "The request names no host.").into_response();
    };
    let name = host_name(&authority);
    let is_ip = name
        .trim_start_matches('[')
        .trim_end_matches(']')
        .parse::<IpAddr>()
        .is_ok();
    if is_ip || name.eq_ignore_ascii_case("localhost") || allowed.has(name) {
        return next.run(request).await;
    }
    let shown: String = name.chars().take(100).collect();
    ApiError::new(Code::HostNotAllowed, format!("The host {shown:?} is not known here.")).into_response()
}

fn authority(headers: &HeaderMap, uri: &Uri) -> Option<String> {
    let mut hosts = headers.get_all(header::HOST).iter();
    match (hosts.next(), hosts.next()) {
        (Some(host), None) => host.to_str().ok().map(str::to_owned),
        (None, _) => uri.authority().map(ToString::to_string),
        (Some(_), Some(_)) => None,
    }
}

/// `host:port` without the port.
fn host_name(authority: &str) -> &str {
    match authority.rsplit_once(':') {
        Some((host, port)) if !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit()) => host,
        _ => authority,
    }
}

/// Answers no page of another origin: neither changes nor reads nor streams, which it could not see but would hold open. A
/// link that opens a page of ours is fine. Clients that are no browsers send neither header and pass.
pub(super) async fn same_site(State(allowed): State<AllowedHosts>, request: Request, next: Next) -> Response {
    match foreign(&request, &allowed) {
        Some(detail) => ApiError::new(Code::OriginNotAllowed, detail).into_response(),
        None => next.run(request).await,
    }
}

/// What shows that another origin asks.
fn foreign(request: &Request, allowed: &AllowedHosts) -> Option<String> {
    let headers = request.headers();
    let text = |name| {
        headers
            .get(name)
            .map(|v: &HeaderValue| v.to_str().unwrap_or("?").to_owned())
    };
    if let Some(site) = text(SEC_FETCH_SITE)
        && !matches!(site.as_str(), "same-origin" | "none")
    {
        let opens_a_page = request.method().is_safe()
            && text(SEC_FETCH_MODE).as_deref() == Some("navigate")
            && text(SEC_FETCH_DEST).as_deref() == Some("document");
        if !opens_a_page {
            return Some(format!("The browser says that the request is {site}."));
        }
    }
    let origin = text(header::ORIGIN)?;
    let named = origin.split_once("://").map(|(_, rest)| rest.to_ascii_lowercase());
    let own = authority(headers, request.uri()).map(|own| own.to_ascii_lowercase());
    // A proxy may put its own name for this server into Host; the public name is then among the allowed ones.
    let is_ours = named.is_some_and(|named| Some(&named) == own.as_ref() || allowed.has(host_name(&named)));
    if is_ours {
        return None;
    }
    let shown: String = origin.chars().take(200).collect();
    Some(format!("The request comes from {shown:?}."))
}

/// Whether a browser says which page the request comes from; what it says was checked by [`same_site`].
pub(super) fn names_its_origin(headers: &HeaderMap) -> bool {
    headers.contains_key(header::ORIGIN) || headers.contains_key(SEC_FETCH_SITE)
}

/// A panic in a handler: logged by the panic hook, told as `internal`.
#[expect(clippy::needless_pass_by_value, reason = "the layer's signature")]
pub(super) fn panicked(panic: Box<dyn std::any::Any + Send + 'static>) -> Response<Body> {
    let message = panic
        .downcast_ref::<&str>()
        .map(|s| (*s).to_owned())
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_default();
    ApiError::internal(format!("a handler panicked: {message}")).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_port_is_not_part_of_the_host_name() {
        assert_eq!(host_name("localhost:8080"), "localhost");
        assert_eq!(host_name("[::1]:8080"), "[::1]");
        assert_eq!(host_name("[::1]"), "[::1]");
        assert_eq!(host_name("127.0.0.1"), "127.0.0.1");
        assert_eq!(host_name("evil.example:80"), "evil.example");
    }
}
